"""Decoding on an accelerator against a float32 computation of the same numbers on this machine's CPU.

    python benchmarks/parity.py [--models small] [--rows 8] [--new-tokens 64]

The models are those of `decode.py`, in float32 and rounded to bfloat16, or `wide`: two layers each, with what Llama 3.1
8B and 3.2 1B have and these lack, four query heads for a kv head, heads of 128 and 64 numbers and 128,256 tokens. Each
decodes on the accelerator, guided (T 1, top-p 0.9, eta 0.1, prompts of several lengths); then the CPU computes the
reference's log-probabilities and the guide's values of the sampled tokens by teacher forcing, in float32 and without a
cache. Prints how far the recorded numbers are from these, and exits with 1 where that is more than rounding explains.
"""

import argparse
import dataclasses
import sys
from typing import Any

import decode
import jax
import numpy as np

from qsharp_jax import decoding
from qsharp_jax.data.batches import Example
from qsharp_jax.evaluation import score
from qsharp_jax.models import config, decoder, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueConfig, ValueModel

# (mean, 99 % quantile) of the differences, of log-probabilities in nats and of values. TF32 products in place of
# float32 ones make errors some 1,000 times larger than float32's.
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (0.05, 0.2)}


def shapes(name: str) -> tuple[DecoderConfig, DecoderConfig]:
    """Configs of the reference and of the guide's trunk."""
    if name != "wide":
        return decode.shapes(name)
    few = dict(vocab_size=128_256, layers=2, heads=16, kv_heads=4, max_positions=1024, tied=True)
    return (
        config.make("tiny", embed=1024, head_dim=128, mlp=2048, **few),
        config.make("tiny", embed=512, head_dim=64, mlp=1024, **few),
    )


def models(name: str, dtype: str) -> tuple[LanguageModel, ValueModel]:
    """Random models with stacked layers on the CPU, float32 numbers that `dtype` holds exactly."""
    ref_config, trunk = (dataclasses.replace(shape, dtype="float32") for shape in shapes(name))
    guide_config = ValueConfig(trunk)
    ref = decoder.init(jax.random.key(0), ref_config)
    guide = value.init(jax.random.key(1), guide_config)
    guide["head"]["kernel"] = jax.random.normal(jax.random.key(2), guide["head"]["kernel"].shape) * 0.05
    ref, guide = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), (ref, guide))
    return LanguageModel(ref, ref_config), ValueModel(guide, guide_config)


def in_dtype(model: Any, dtype: str, device: jax.Device) -> Any:
    """The model on a device, stored and computed in `dtype`."""
    params = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(dtype), model.params), device)
    if isinstance(model, ValueModel):
        return ValueModel(params, model.config.computed_in(dtype))
    return LanguageModel(params, dataclasses.replace(model.config, dtype=dtype))


def differences(name: str, dtype: str, rows: int, new_tokens: int) -> dict[str, np.ndarray]:
    """Absolute differences of every sampled token's recorded numbers, by their names."""
    cpu, device = jax.local_devices(backend="cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        ref, guide = models(name, dtype)
    setting = decode.SETTINGS["small" if name == "wide" else name]["run"]
    setting = dataclasses.replace(setting, temperature=1.0, room=new_tokens)
    work = decode.Work(setting, rows, ref.config.vocab_size)
    with jax.default_device(device):
        on_device = [decoding.for_decoding(in_dtype(model, dtype, device)) for model in (ref, guide)]
        sampled = decoding.generate(*on_device, work.prompts(), setting.sampling(None), rng=0)
    examples = [Example(prompt, sampled.response(row)) for row, prompt in enumerate(work.prompts())]
    with jax.default_device(cpu):
        batches = dict(rows=rows, bucket=64)
        log_probs = score.log_probs(ref, examples, vocab_size=ref.config.vocab_size, **batches)
        values = score.score(guide, examples, **batches)
    errors: dict[str, list[np.ndarray]] = {"ref_log_probs": [], "values": []}
    for row, length in enumerate(sampled.lengths):
        errors["ref_log_probs"].append(sampled.ref_log_probs[row, :length] - log_probs[row])
        # The guide reads a token that was not a candidate one step later, so a last one may have no value.
        errors["values"].append(sampled.values[row, : length - 1] - values[row][:-1])
    return {what: np.abs(np.concatenate(of_rows)) for what, of_rows in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=("tiny", "small", "wide"), default="small")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| dtype    | number        | mean     | 99 %     | largest  | limits         |")
    print("| -------- | ------------- | -------- | -------- | -------- | -------------- |")
    wrong = False
    for dtype, limits in LIMITS.items():
        for what, of in differences(options.models, dtype, options.rows, options.new_tokens).items():
            found = of.mean(), np.quantile(of, 0.99)
            wrong |= not all(error <= limit for error, limit in zip(found, limits, strict=True))
            print(
                f"| {dtype:8s} | {what:13s} | {found[0]:8.1e} | {found[1]:8.1e} | {of.max():8.1e} |"
                f" {limits[0]:.0e}, {limits[1]:.0e}   |"
            )
    if wrong:
        sys.exit("\nThe device does not compute what the CPU does.")


if __name__ == "__main__":
    main()
