"""`generate` and `stream` from texts to texts.

Shapes: R rows, which are the prompts' samples, a prompt's next to each other; N tokens.
"""

import dataclasses
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qsharp_jax import decoding, rollouts
from qsharp_jax.decoding import Generation, by_name, cache_size, dequantized, row_seeds, rows_that_fit
from qsharp_jax.decoding import Guide as Guides
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.notebook.guides import AnyGuide, for_reference
from qsharp_jax.notebook.inputs import to_prompt, to_prompts
from qsharp_jax.run.folders import Loaded
from qsharp_jax.sampling import DEFAULT_ETA, Sampling
from qsharp_jax.system import stop_strings
from qsharp_jax.system.chat import Prompt, as_text
from qsharp_jax.system.errors import UserError, warn


@dataclasses.dataclass(frozen=True)
class Responses:
    """Responses to prompts. A notebook shows them as a table.

    Attributes:
      prompts: [R], each prompt as many times as it was answered.
      texts: [R].
      generation: tokens [R, N], log-probabilities, KL and values of each, and which responses ended by themselves.
    """

    prompts: list[Prompt]
    texts: list[str]
    generation: Generation = dataclasses.field(repr=False)

    @property
    def kl(self) -> np.ndarray:
        """[R]: exact KL to the reference of each response, in nats, before truncation."""
        assert self.generation.kl is not None  # `generate` records it
        return self.generation.kl.sum(1)

    def _repr_html_(self) -> str:
        cells = zip(map(as_text, self.prompts), self.texts, (f"{kl:.2f}" for kl in self.kl), strict=True)
        rows = ["".join(f'<td style="text-align: left">{html.escape(cell)}</td>' for cell in row) for row in cells]
        head = "<tr><th>prompt</th><th>response</th><th>KL (nats)</th></tr>"
        return f"<table>{head}{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def generate(
    ref: Loaded,
    guide: AnyGuide | None,
    prompts: Iterable[Prompt | Mapping[str, Any]],
    sampling: Sampling | None = None,
    *,
    samples: int = 1,
    seed: int = 0,
) -> Responses:
    """Answer prompts with the guided reference.

    Args:
      ref: what `load` returns.
      guide: of a `train_guide`, of `load_guide` or of `load`, or a list of several; None for the reference alone.
      prompts: texts, chats as lists of messages, or dicts with one of them as "prompt", which are encoded in the
        reference's prompt format.
      sampling: eta and the other settings of decoding; without any, eta is 0.1 with a guide. With a `Sampling` without
        eta the guide is not used, and a line says so. Stop ids and vocabulary are by default the tokenizer's. Fields
        that may be given per row have an entry for each sample of each prompt.
      samples: responses to each prompt.
      seed: of everything that is random.

    Raises:
      UserError: for a guide with other tokens than the reference, for prompts of another form, and as
        `qsharp_jax.decoding.generate`.
    """
    texts_or_chats, model = to_prompts(prompts), for_reference(guide, ref)
    sampling = with_eta(of_model(ref, sampling), model, is_default=sampling is None)
    if not texts_or_chats:
        raise UserError("there are no prompts; give at least one")
    check_counts(samples, seed)
    encoded = [ref.tokenizer.encode_prompt(prompt) for prompt in texts_or_chats]
    responses = len(encoded) * samples
    generation = rollouts.sample(
        ref.ref,
        model,
        encoded,
        sampling,
        seeds=row_seeds(seed, responses),
        batch_size=rows_of(ref, model, encoded, sampling, responses),
        samples=samples,
        name="generate",
        tokenizer=ref.tokenizer,
    )
    texts = [text_of(ref, sampling, generation, row) for row in range(len(generation.lengths))]
    return Responses([prompt for prompt in texts_or_chats for _ in range(samples)], texts, generation)


def stream(
    ref: Loaded,
    guide: AnyGuide | None,
    prompt: Prompt | Mapping[str, Any],
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the text of a response to one prompt in pieces, as they are decoded; arguments as of `generate`."""
    tokens, model = [ref.tokenizer.encode_prompt(to_prompt(prompt, "the prompt"))], for_reference(guide, ref)
    sampling = with_eta(of_model(ref, sampling), model, is_default=sampling is None)
    check_counts(1, seed)
    blocks = decoding.stream(ref.ref, model, tokens, sampling, rng=seed, record=(), tokenizer=ref.tokenizer)
    yield from ref.tokenizer.decode_stream((rows[0] for rows in blocks), sampling.stop)


def text_of(ref: Loaded, sampling: Sampling, generation: Generation, row: int) -> str:
    """Return the text of a response, up to a stop string."""
    return stop_strings.cut(ref.tokenizer.decode(generation.response(row)), sampling.stop)


def rows_of(
    ref: Loaded, guide: Guides | None, prompts: Sequence[Sequence[int]], sampling: Sampling, responses: int
) -> int:
    """Return how many rows to decode at once; a power of two, so that further calls find their program compiled."""
    copies = dequantized(*by_name(ref.ref, guide))
    size = cache_size(max(map(len, prompts)), sampling.max_new_tokens, sampling.prompt_bucket)
    return min(1 << (responses - 1).bit_length(), rows_that_fit([ref.ref.config] * 2, size, copies or None))


def check_counts(samples: int, seed: int) -> None:
    """Raise a UserError for less than one response to a prompt, or a seed below 0."""
    for name, number, least in (("samples", samples, 1), ("seed", seed, 0)):
        if number < least:
            raise UserError(f"{name} is {number}; it must be at least {least}")


def with_eta(sampling: Sampling, guide: Guides | None, *, is_default: bool) -> Sampling:
    """Return default settings with the default eta for a guide; a line says where given settings do not use it."""
    if guide is None or isinstance(guide, LanguageModel) or not np.isinf(sampling.eta).all():
        return sampling
    if is_default:
        return dataclasses.replace(sampling, eta=DEFAULT_ETA)
    warn(f"the guide is not used, since the sampling's eta is inf; give one, such as eta={DEFAULT_ETA:g}")
    return sampling


def of_model(ref: Loaded, sampling: Sampling | None) -> Sampling:
    """Complete the settings by the reference's stop ids and vocabulary, where they are not given."""
    if sampling is None:
        return ref.sampling
    own = ref.sampling
    return dataclasses.replace(
        sampling,
        stop_ids=sampling.stop_ids or own.stop_ids,
        vocab_size=own.vocab_size if sampling.vocab_size is None else sampling.vocab_size,
        top_k_candidates=min(sampling.top_k_candidates, ref.tokenizer.vocab_size),
    )
