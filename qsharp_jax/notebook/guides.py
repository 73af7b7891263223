"""A guide with its tokenizer: as trained, saved to a folder, and loaded from one."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsharp_jax.data.tokenizer import Tokenizer, check_same_tokens
from qsharp_jax.data.tokenizer_files import has_tokenizer
from qsharp_jax.decoding import Guide as Guides
from qsharp_jax.decoding import for_decoding
from qsharp_jax.models import hf
from qsharp_jax.models.hf import hub
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run.folders import Loaded
from qsharp_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Guide:
    """A value model that guides a reference.

    Attributes:
      model: the value model.
      tokenizer: its own, which has the reference's entries; None if its folder has none.
      trained_on: for the model card, in Markdown.
    """

    model: ValueModel
    tokenizer: Tokenizer | None
    trained_on: str = ""

    def __repr__(self) -> str:
        config = self.model.config
        return f"Guide({config.trunk.layers} layers of width {config.trunk.embed}, {config.distribution})"

    def save(self, folder: str | Path) -> None:
        """Write the guide to a folder that `load_guide`, the command line and `transformers` load.

        Args:
          folder: new, empty, or an earlier export, which is replaced.

        Raises:
          UserError: if something else is in the folder, or `transformers` has no form for the guide.
        """
        tokenizer = None if self.tokenizer is None else self.tokenizer.for_export()
        hf.export_guide(self.model, Path(folder).expanduser(), tokenizer=tokenizer, trained_on=self.trained_on)


def load_guide(folder: str | Path, *, dtype: str | None = None) -> Guide:
    """Load a guide that `Guide.save` or `qsharp export` wrote, or one on the Hugging Face hub.

    Args:
      dtype: "float32" or "bfloat16", for weights and computation; by default the folder's own.

    Raises:
      UserError: for a folder that does not hold a guide.
    """
    path = hub.find(folder)
    if not hf.is_guide(path):
        raise UserError(f"{folder} is not a guide's folder; give one that Guide.save or `qsharp export` wrote")
    model = hf.load_guide(path, dtype=dtype or hf.stored_dtype(path))
    return Guide(model, Tokenizer.load(path) if has_tokenizer(path) else None)


AnyGuide = Guide | Guides | Sequence[Guide | ValueModel]  # one, or several whose tilts are composed


def for_reference(guide: AnyGuide | None, ref: Loaded) -> Guides | None:
    """Return the model of a guide, or the tuple of several, in the form for decoding.

    Raises:
      UserError: for a guide with other tokens than the reference.
    """
    if isinstance(guide, tuple | list):
        return tuple(_model(member, ref) for member in guide)
    return _model(guide, ref)


def _model(guide: Any, ref: Loaded) -> Any:
    if isinstance(guide, Guide):
        if guide.tokenizer is not None and guide.tokenizer.hf_tokenizer is not ref.tokenizer.hf_tokenizer:
            check_same_tokens(ref.tokenizer, guide.tokenizer)
        return for_decoding(guide.model)
    return guide
