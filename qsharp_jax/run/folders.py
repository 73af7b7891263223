"""A reference and guides in folders of `transformers`: tokenizers, shapes, and, on request, the weights.

Everything that can be refused without the weights is refused before they are read.
"""

import dataclasses
import datetime
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qsharp_jax.data.tokenizer import Tokenizer, check_same_tokens
from qsharp_jax.data.tokenizer_files import has_tokenizer
from qsharp_jax.decoding import Guide, guide_names
from qsharp_jax.models import cpu_form, decoder, hf, quantized, sharding, value
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.models.hf import hub
from qsharp_jax.models.value import ValueConfig, ValueModel
from qsharp_jax.sampling import Sampling
from qsharp_jax.system import progress
from qsharp_jax.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Folders:
    """Models to use together, each from its folder.

    Raises:
      UserError: for a folder without a model, or a guide with other tokens than the reference.
    """

    ref: Path | None  # the reference's folder or GGUF file, or None
    guides: Sequence[Path] = ()  # folders of guides; without a reference, of one
    dtype: str | None = None  # of weights and computation, "float32" or "bfloat16"; by default each folder's own
    prompt_format: str | None = None  # "plain" or "chat", see `Tokenizer`; by default chat if there is a template
    stop_ids: Sequence[int] | None = None  # by default those of the reference's folder
    date: datetime.date | None = None  # today's date for a chat template that writes it; by default the current date
    mesh: Mesh | None = None  # over which the weights are divided as for decoding
    quantize: str = "none"  # "int8" or "int4" for quantized weights

    def __post_init__(self):
        configs = self.configs  # first, since this checks that these are folders of models
        check_vocabulary(self.tokenizer, configs, self.guides if self.ref else (), f"the tokenizer in {self._first}")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The reference's tokenizer, or the guide's without a reference."""
        return load_tokenizer(self._first, prompt_format=self.prompt_format, stop_ids=self.stop_ids, date=self.date)

    @functools.cached_property
    def configs(self) -> dict[str, DecoderConfig]:
        """The shapes of the "reference" and of the guides' trunks, named by `decoding.guide_names`."""
        configs = {"reference": self._ref_config()} if self.ref else {}
        return configs | {name: self._guide_config(guide).trunk for name, guide in self._named_guides()}

    @property
    def weights(self) -> dict[str, Any]:
        """The weights of the models in `configs` as `jax.ShapeDtypeStruct`s, on the mesh if there is one."""
        shapes = {"reference": self._ref_shapes()} if self.ref else {}
        shapes |= {name: self._guide_shapes(guide) for name, guide in self._named_guides()}
        return {
            name: sharding.move(jax.eval_shape(quantized.model, model), self.mesh, sharding.DECODE).params
            for name, model in shapes.items()
        }

    def load_ref(self) -> LanguageModel:
        progress.tell(f"loading the reference {self.ref}")
        dtype, shardings = self._dtype(self.ref), self._shardings(self._ref_shapes())
        return hf.load_ref(self.ref, dtype=dtype, quantize=self.quantize, shardings=shardings)

    def load_guide(self) -> Guide:
        """The guide, or a tuple of several."""
        progress.tell(f"loading the guide {', '.join(map(str, self.guides))}")
        guides = tuple(
            hf.load_guide(
                guide, dtype=self._dtype(guide), quantize=self.quantize,
                shardings=self._shardings(self._guide_shapes(guide)),
            )
            for guide in self.guides
        )
        return guides if len(guides) > 1 else guides[0]

    def _ref_shapes(self) -> LanguageModel:
        config = self._ref_config()
        return LanguageModel(decoder.abstract(config, config.dtype), config)

    def _guide_shapes(self, guide: Path) -> ValueModel:
        config = self._guide_config(guide)
        return ValueModel(value.abstract(config, config.trunk.dtype), config)

    def _ref_config(self) -> DecoderConfig:
        return hf.read_config(self.ref, self._dtype(self.ref), self.quantize)

    def _guide_config(self, guide: Path) -> ValueConfig:
        return hf.read_guide_config(guide, self._dtype(guide), self.quantize)

    def _shardings(self, shapes: LanguageModel | ValueModel) -> Params | None:
        if self.mesh is None:
            return None
        unstack = decoder.unstack if isinstance(shapes, LanguageModel) else value.unstack
        params = jax.eval_shape(functools.partial(unstack, transposed=cpu_form.here()), shapes.params)
        shapes = jax.eval_shape(quantized.model, shapes.replace(params=params))
        return sharding.of_model(shapes, self.mesh, sharding.DECODE).params

    @property
    def _first(self) -> Path:
        return self.ref or self.guides[0]

    def _named_guides(self) -> Iterator[tuple[str, Path]]:
        return zip(guide_names(len(self.guides)), self.guides, strict=True)

    def _dtype(self, folder: Path) -> str:
        return self.dtype or hf.stored_dtype(folder)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Models in memory.

    Attributes:
      source: the reference's folder or GGUF file, or its id on the hub with the commit.
      ref: the reference.
      guide: the guide, a tuple of several, or None.
      tokenizer: the reference's.
      sampling: a `Sampling` with the tokenizer's stop ids and vocabulary; change the rest by `dataclasses.replace`.
    """

    source: str
    ref: LanguageModel = dataclasses.field(repr=False)
    guide: Guide | None = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    sampling: Sampling


def load(
    ref: str | Path,
    guide: str | Path | Sequence[str | Path] | None = None,
    *,
    dtype: str | None = None,
    quantize: str = "none",
    prompt_format: str | None = None,
) -> Loaded:
    """Load a reference, and a guide or several, by folder, by GGUF file, or by id on the Hugging Face hub.

    Args:
      ref: a language model's folder as `transformers` keeps it, GGUF file, or id "OWNER/NAME" or "OWNER/NAME@REVISION".
      guide: folder or id of a guide that goes with it, or those of several.
      dtype: "float32" or "bfloat16", for weights and computation; by default each folder's own.
      quantize: "int8" or "int4": the models are then those with weights of so many bits.
      prompt_format: "plain" for prompts as they are, or "chat" for prompts in the tokenizer's chat template; by default
        chat, if there is a template.

    Raises:
      UserError: for a folder that does not hold such a model, or a guide with other tokens than the reference.
    """
    guides = [guide] if isinstance(guide, str | Path) else guide or []
    source = hub.pin(str(ref))
    folders = Folders(
        hub.find(source), [hub.find(name) for name in guides],
        dtype=dtype, prompt_format=prompt_format, quantize=quantize,
    )  # fmt: skip
    tokenizer = folders.tokenizer
    candidates = min(Sampling.top_k_candidates, tokenizer.vocab_size)
    sampling = Sampling(top_k_candidates=candidates, stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size)
    return Loaded(source, folders.load_ref(), folders.load_guide() if guides else None, tokenizer, sampling)


def tokenizer_folder(model: Path) -> Path:
    """The folder of a model's tokenizer: its own, or that of its base for an adapter without one."""
    base = hf.base_of(model)
    return model if base is None or has_tokenizer(model) else base


def load_tokenizer(
    model: Path,
    *,
    prompt_format: str | None,
    stop_ids: Sequence[int] | None = None,
    date: datetime.date | None = None,
) -> Tokenizer:
    """Load a model's tokenizer, for the rows of its embedding; arguments and errors as in `Tokenizer.load`."""
    tokenizer = Tokenizer.load(
        tokenizer_folder(model), base=hf.base_of(model), prompt_format=prompt_format, stop_ids=stop_ids, date=date
    )
    return dataclasses.replace(tokenizer, embedding_rows=hf.read_config(model, "float32").vocab_size)


def check_vocabulary(text: Tokenizer, configs: Mapping[str, DecoderConfig], guides: Sequence[Path], whose: str) -> None:
    """Check that models have the tokens of a tokenizer; a UserError names the first model or entry that differs.

    Args:
      configs: the models' shapes, by their names in messages.
      guides: folders whose tokenizers, if any, must have the same entries.
      whose: the tokenizer's name in messages.
    """
    needed = max(text.vocab_size, text.needed_rows)
    for what, config in configs.items():
        if config.vocab_size < needed:
            raise UserError(
                f"the {what} has {config.vocab_size} tokens in its embedding, but {whose} has ids up to {needed - 1} in"
                " use; use the model's own tokenizer"
            )
    for guide in filter(has_tokenizer, guides):
        check_same_tokens(text, Tokenizer.load(guide))
