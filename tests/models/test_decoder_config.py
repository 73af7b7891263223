"""Configs of decoders and guides: published sizes, and fields that are refused by name."""

import jax
import pytest
from hf_folders import LLAMA

from qsharp_jax.models import config as configs
from qsharp_jax.models import decoder
from qsharp_jax.models.value import ValueConfig

# As counted by the publishers' own checkpoints.
PUBLISHED = {
    "gpt2-small": 124_439_808, "gpt2-medium": 354_823_168, "llama3-1b": 1_235_814_400, "llama3-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496, "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
    "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512, "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560,
    "gemma3-270m": 268_098_176, "gemma3-1b": 999_885_952,
}  # fmt: skip


@pytest.mark.parametrize("size", [size for size in configs.SIZES if size != "tiny"])
def test_named_sizes_have_the_published_number_of_parameters(size):
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract(configs.make(size)))) == PUBLISHED[size]


def tiny(**changes):
    return lambda: configs.make("tiny", **changes)


def guide(**changes):
    return lambda: ValueConfig(LLAMA, **changes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: configs.make("llama9"), "model.size is 'llama9'; the named sizes are tiny, gpt2-small"),
        (tiny(width=5), r"unknown model fields width; known are activation, bias,"),
        (tiny(positions="alibi"), r"model\.positions is 'alibi'; it must be one of rope, learned"),
        (tiny(norm="batch"), r"model\.norm is 'batch'"),
        (tiny(activation="relu"), r"model\.activation is 'relu'"),
        (tiny(dtype="float16"), r"model\.dtype is 'float16'; it must be one of float32, bfloat16"),
        (tiny(layers=0), r"model\.layers is 0; it must be at least 1"),
        (tiny(vocab_size=-1), r"model\.vocab_size is -1"),
        (tiny(max_positions=0), r"model\.max_positions is 0"),
        (tiny(heads=6, kv_heads=4), r"model\.heads \(6\) must be a multiple of model\.kv_heads \(4\)"),
        (tiny(head_dim=5), r"model\.head_dim is 5; rotary positions need an even one"),
        (tiny(rope_dims=3), r"model\.rope_dims is 3; rotary positions need an even one"),
        (tiny(rope_dims=26), r"model\.rope_dims is 26; it must be from 0 to model\.head_dim"),
        (tiny(window=1, window_layers=(0,)), r"model\.window is 1; it must be 0 with no model\.window_layers, or at"),
        (tiny(window=8), r"model\.window is 8; it must be 0 with no model\.window_layers"),
        (tiny(experts=4), r"model\.experts_per_token is 0; it must be from 1 to model\.experts \(4\), or 0 without"),
        (tiny(experts=4, experts_per_token=5), r"model\.experts_per_token is 5"),
        (tiny(experts=4, experts_per_token=2, bias=True), r"model\.experts needs model\.activation swiglu"),
        (tiny(rope_factor=0.5), r"model\.rope_factor is 0.5; it must be at least 1"),
        (tiny(rope_low_freq=4.0), r"model\.rope_low_freq \(4.0\) must be above 0 and below model.rope_high_freq"),
        (guide(type="x"), r"value\.type is 'x'; it must be v or q"),
        (guide(distribution="gaussian"), r"value\.distribution is 'gaussian'; it must be bernoulli, categorical or"),
        (guide(distribution="categorical", atoms=(1.0,)), r"at least two value\.atoms"),
    ],
)
def test_a_bad_config_is_refused_by_the_name_of_its_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()
