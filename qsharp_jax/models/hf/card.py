"""Model cards of exported folders, in Markdown: what the model is, how to load it, its metrics."""

from collections.abc import Mapping
from typing import Any

from qsharp_jax.models.hf.families import Family
from qsharp_jax.models.value import ValueConfig

_LOAD = """\
Load it with `transformers`:

```python
{imports}
{name} = {model}.from_pretrained("path/to/this/folder")
tokenizer = PreTrainedTokenizerFast.from_pretrained("path/to/this/folder")
{use}```
"""
_OUTPUTS = """\
outputs = guide(**tokenizer("some text", return_tensors="pt")).logits  # [1, length, {width}]
"""
_MEANING_V = """\
`outputs` at a token parametrize the distribution of the reward that follows once that token has been appended and the
reference model finishes the text: {meaning}.
"""
_MEANING_Q = """\
These are not logits of a next token. `outputs` at a position, for each token of the vocabulary, parametrize the
distribution of the reward that follows once that token is appended there and the reference model finishes the text:
{meaning}.
"""
_STEER = """\
Steer the reference model with it, at any strength of guidance (a small eta is a strong one), by `qsharp_jax`:

```
qsharp generate --ref path/to/the/reference --guide path/to/this/folder --eta 0.1 "A prompt"
```
"""
_LOAD_ADAPTER = """\
Load it with `peft`, on as many layers of the base as the guide has:

```python
from peft import PeftModel
from transformers import {model}

base = {model}.from_pretrained({arguments})
guide = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""
_STEER_ELSEWHERE = """\
By `transformers`, with the code in this folder's `custom_generate`, which runs in PyTorch:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/the/reference")
tokenizer = AutoTokenizer.from_pretrained("path/to/the/reference")
inputs = tokenizer("A prompt", return_tensors="pt")
output = model.generate(
    **inputs, custom_generate="path/to/this/folder", trust_remote_code=True, eta=0.1, max_new_tokens=64
)
print(tokenizer.decode(output[0]))
```

By a server of `qsharp_jax`, or by vLLM with `qsharp_jax` installed beside it:

```
qsharp serve --ref path/to/the/reference --guide mine=path/to/this/folder --port 8000
QSHARP_GUIDES=mine=path/to/this/folder vllm serve path/to/the/reference --port 8000 --no-async-scheduling
```

```py
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "A prompt"}],
    extra_body={"eta": 0.1, "guide": "mine"},  # of vLLM: {"vllm_xargs": {"eta": 0.1, "guide": "mine"}}
)
```
"""


def ref(trained_on: str, metrics: Mapping[str, Any]) -> str:
    """The card of a reference model."""
    load = _load("AutoModelForCausalLM", "model")
    return _card("Reference model", "A causal language model, exported by `qsharp`.", [load], trained_on, metrics)


def adapter(config: ValueConfig, base: str, trained_on: str, metrics: Mapping[str, Any]) -> str:
    """The card of a guide that is an adapter of `base`."""
    is_v = config.type == "v"
    text = (_MEANING_V if is_v else _MEANING_Q).format(meaning=_meaning(config))
    load = _LOAD_ADAPTER.format(
        model="AutoModelForTokenClassification" if is_v else "AutoModelForCausalLM",
        arguments=f'"{base}", num_hidden_layers={config.trunk.layers}'
        + (f", num_labels={config.outputs}" if is_v else ""),
    )
    what = f"{_what(config)} A LoRA adapter, as PEFT reads it, of `{base}`."
    return _card("Guide", what, [load, text, _STEER], trained_on, metrics)


def guide(config: ValueConfig, family: Family, trained_on: str, metrics: Mapping[str, Any]) -> str:
    """The card of a guide whose trunk is of the family."""
    if config.type == "v":
        use, text = _OUTPUTS.format(width=config.outputs), _MEANING_V
        if family.definition:
            load = _load(family.classifier, "guide", use, definition=family.definition)
        else:
            load = _load("AutoModelForTokenClassification", "guide", use)
    else:
        load, text = _load("AutoModelForCausalLM", "guide", _OUTPUTS.format(width="vocabulary")), _MEANING_Q
    sections = [load, text.format(meaning=_meaning(config)), _STEER, _STEER_ELSEWHERE]
    return _card("Guide", _what(config), sections, trained_on, metrics)


def _load(model: str, name: str, use: str = "", *, definition: str = "") -> str:
    """The section on loading with a class of `transformers`, or one that `definition` defines."""
    if definition:
        imports = f"from transformers import PreTrainedTokenizerFast\n{definition}"
    else:
        imports = f"from transformers import {model}, PreTrainedTokenizerFast\n"
    return _LOAD.format(imports=imports, model=model, name=name, use=use)


def _what(config: ValueConfig) -> str:
    return (
        "A value model that guides a frozen reference model while it decodes (Q#,"
        f" [arXiv 2502.20548](https://arxiv.org/abs/2502.20548)): {config.type.upper()}-type, {config.distribution}."
    )


def _meaning(config: ValueConfig) -> str:
    return {
        "bernoulli": "the reward is 1 with probability `sigmoid(outputs)`, else 0",
        "scalar": "its mean is `outputs`",
        "categorical": f"a `softmax` over the rewards {', '.join(map(str, config.atoms))}",
    }[config.distribution]


def _card(title: str, what: str, sections: list[str], trained_on: str, metrics: Mapping[str, Any]) -> str:
    parts = ["---\nlibrary_name: transformers\ntags:\n- qsharp\n---\n", f"# {title}\n", f"{what}\n"]
    if trained_on:
        parts += ["## Trained on\n", f"{trained_on.strip()}\n"]
    parts += ["## Use\n", *sections]
    if metrics:
        rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in metrics.items())
        parts += ["## Metrics\n", f"| metric | value |\n| --- | --- |\n{rows}"]
    return "\n".join(parts)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
