"""The model cards of exported folders, in Markdown: what a model is, how to load it, its metrics."""

from collections.abc import Mapping
from typing import Any

from qsharp_jax.models.value import ValueConfig

_REF = """\
Load it with `transformers`:

```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = PreTrainedTokenizerFast.from_pretrained("path/to/this/folder")
```
"""

_GUIDE_V = """\
Load it with `transformers`:

```python
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerFast

guide = AutoModelForTokenClassification.from_pretrained("path/to/this/folder")
tokenizer = PreTrainedTokenizerFast.from_pretrained("path/to/this/folder")
outputs = guide(**tokenizer("some text", return_tensors="pt")).logits  # [1, length, {outputs}]
```

`outputs` at a token parametrise the law of the reward that follows once that token has been appended and the reference
model finishes the text: {meaning}.
"""

_GUIDE_Q = """\
Load it with `transformers`:

```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

guide = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = PreTrainedTokenizerFast.from_pretrained("path/to/this/folder")
outputs = guide(**tokenizer("some text", return_tensors="pt")).logits  # [1, length, vocabulary]
```

These are no logits of a next token. `outputs` at a position, for each token of the vocabulary, parametrise the law of
the reward that follows once that token is appended there and the reference model finishes the text: {meaning}.
"""

_STEER = """\
Steer the reference model with it, at any strength of guidance (a small eta is a strong one):

```
qsharp generate --ref path/to/the/reference --guide path/to/this/folder --eta 0.1 "A prompt"
```
"""


def ref(trained_on: str, metrics: Mapping[str, Any]) -> str:
    """Of a reference model."""
    return _card("Reference model", "A causal language model, exported by `qsharp`.", [_REF], trained_on, metrics)


def guide(config: ValueConfig, trained_on: str, metrics: Mapping[str, Any]) -> str:
    """Of a guide."""
    meaning = {
        "bernoulli": "the reward is 1 with probability `sigmoid(outputs)`, else 0",
        "scalar": "its mean is `outputs`",
        "categorical": f"a `softmax` over the rewards {', '.join(map(str, config.atoms))}",
    }[config.distribution]
    what = (
        "A value model that guides a frozen reference model while it decodes (Q#,"
        f" [arXiv 2502.20548](https://arxiv.org/abs/2502.20548)): {config.type.upper()}-type, {config.distribution}."
    )
    load = (_GUIDE_V if config.type == "v" else _GUIDE_Q).format(outputs=config.outputs, meaning=meaning)
    return _card("Guide", what, [load, _STEER], trained_on, metrics)


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
