"""Conversion between text and token ids with any `transformers` tokenizer, and comparison of two models' tokens."""

import copy
import dataclasses
import datetime
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

import qsharp_jax.data.tokenizer_files as files
from qsharp_jax.system import stop_strings
from qsharp_jax.system.chat import Prompt
from qsharp_jax.system.errors import UserError, first_line, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("plain", "chat")
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError)  # raised by chat templates


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `transformers` tokenizer with fixed rules for how a prompt begins and what ends a response.

    Raises:
      UserError: for the chat format without a chat template, or stop ids that the tokenizer does not have.
    """

    hf_tokenizer: "PreTrainedTokenizerBase"  # of any kind
    # "plain", the text itself, or "chat", one user turn in the tokenizer's chat template, up to where the answer begins
    prompt_format: str = "plain"
    # ids at the start of a plain prompt; by default the bos token, if there is one
    prefix_ids: tuple[int, ...] | None = None
    # a response ends at the first of these; by default the eos token and the token that ends a chat's turn
    stop_ids: tuple[int, ...] | None = None
    date: datetime.date = dataclasses.field(default_factory=datetime.date.today)  # today's date for a chat template
    # of the model's embedding, which may lack special tokens that it never has; by default enough for every id
    embedding_rows: int | None = None

    def __post_init__(self):
        if self.prompt_format not in FORMATS:
            raise UserError(f"the prompt format is {self.prompt_format!r}; it must be one of {', '.join(FORMATS)}")
        if self.prompt_format == "chat" and not self.hf_tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {self._name} has no chat template; use the prompt format plain, or a folder with one"
            )
        if self.prefix_ids is None:
            bos = self.hf_tokenizer.bos_token_id
            object.__setattr__(self, "prefix_ids", () if bos is None else (bos,))
        if self.stop_ids is None:
            own = {self.hf_tokenizer.eos_token_id, self.end_of_turn} - {None}
            object.__setattr__(self, "stop_ids", tuple(sorted(own)))
        largest = max(self.entries)
        for stop in self.stop_ids:
            if not 0 <= stop <= largest:
                raise UserError(f"the stop id {stop} is not in the vocabulary; ids are in 0..{largest}")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base: str | Path | None = None,
        prompt_format: str | None = "plain",
        stop_ids: Sequence[int] | None = None,
        date: datetime.date | None = None,
    ) -> "Tokenizer":
        """Load the tokenizer of a model's folder; prompts begin as its tokenizer.json says.

        Args:
          base: the folder or GGUF file of the model that an adapter in the folder changes, if one does.
          prompt_format: "plain" or "chat"; None: chat if there is a chat template.
          stop_ids: by default those of generation_config.json (else of config.json), if need be of the base's, with the
            tokenizer's own.
          date: by default today.

        Raises:
          UserError: if the folder has no tokenizer, a damaged one, or contradictory files, and as in the class.
        """
        hf_tokenizer = files.read(folder)
        prefix_ids, suffix_ids = files.around(hf_tokenizer)
        if suffix_ids:
            names = "".join(hf_tokenizer.convert_ids_to_tokens(list(suffix_ids)))
            warn(f"the tokenizer in {folder} appends {names!r} to every text; prompts leave it out")
        if prompt_format is None:
            prompt_format = "chat" if hf_tokenizer.chat_template else "plain"
        own = None if stop_ids is None else tuple(stop_ids)
        tokenizer = cls(hf_tokenizer, prompt_format, prefix_ids, own, date or datetime.date.today())
        if stop_ids is None:
            # A config made for another vocabulary may list ids that do not exist here; they are never drawn.
            listed = {token for token in files.listed_stop_ids(folder, base) if 0 <= token < tokenizer.vocab_size}
            tokenizer = dataclasses.replace(tokenizer, stop_ids=tuple(sorted({*tokenizer.stop_ids, *listed})))
        return tokenizer

    @functools.cached_property
    def entries(self) -> dict[int, str]:
        """Every token's string by its id, added tokens included."""
        return {token: entry for entry, token in self.hf_tokenizer.get_vocab().items()}

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id that the model may draw, plus one. An embedding may have more rows, as padding."""
        size = max(self.entries) + 1
        return size if self.embedding_rows is None else min(size, self.embedding_rows)

    @functools.cached_property
    def needed_rows(self) -> int:
        """Rows that an embedding must have: for all ids but those of special tokens that no text and no stop has.

        Gemma's text models have the tokenizer of those that see images, with a token for these past the embedding, and
        fine-tuned models often have a padding token there.
        """
        return max({*self.entries} - self.special_ids | {*self.stop_ids, *self.template_ids}) + 1

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The special token that the chat template writes after an answer; None if there is none."""
        after = self._raw(self._sample_chat(answered=True).rpartition("ANSWER")[2])
        special = {*self.hf_tokenizer.added_tokens_decoder, *self.hf_tokenizer.all_special_ids}
        return next((token for token in after if token in special), None)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that ordinary text never contains."""
        added = {token for token, entry in self.hf_tokenizer.added_tokens_decoder.items() if entry.special}
        return frozenset(added | {*self.hf_tokenizer.all_special_ids})

    @functools.cached_property
    def template_ids(self) -> frozenset[int]:
        """Tokens around texts: the prefix of a prompt, bos, eos, and everything that the chat template writes."""
        named = {self.hf_tokenizer.bos_token_id, self.hf_tokenizer.eos_token_id} - {None}
        chats = [self._raw(self._sample_chat(answered)) for answered in (True, False)]
        return frozenset({*self.prefix_ids, *named}.union(*chats))

    @functools.cached_property
    def writes_date(self) -> bool:
        """True if prompts depend on the date: chats whose template reads the clock."""
        other = dataclasses.replace(self, date=datetime.date(2000, 1, 2))
        return self.prompt_format == "chat" and self._sample_chat(False) != other._sample_chat(False)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Encode a text, or a chat's messages, in the prompt format.

        Raises:
          UserError: for unknown words, errors of the template, and messages in the plain format.
        """
        if self.prompt_format == "chat":
            try:
                text = self._render(prompt)
            except _REFUSALS as error:
                raise UserError(
                    f"the chat template of the tokenizer {self._name} refuses a prompt ({first_line(error)}); fix"
                    " it, or use the prompt format plain"
                ) from error
            return self._encode(text, "prompt")  # the template writes the bos token itself
        if not isinstance(prompt, str):
            raise UserError(
                "a prompt is a list of messages, but the prompt format is plain; use the prompt format chat"
                if self.hf_tokenizer.chat_template
                else f"a prompt is a list of messages, but the tokenizer {self._name} has no chat template; give texts"
            )
        tokens = self._encode(prompt, "prompt")
        if self.prefix_ids and tuple(tokens[: len(self.prefix_ids)]) == self.prefix_ids:
            _ = self._warn_of_prefix
            return tokens
        return [*self.prefix_ids, *tokens]

    def encode_response(self, response: str) -> list[int]:
        """Encode a response with the token that ends it: in a chat the end of a turn, else eos; errors as above."""
        end = self.end_of_turn if self.prompt_format == "chat" else None
        end = self.hf_tokenizer.eos_token_id if end is None else end
        return [*self._encode(response, "response"), *([] if end is None else [end])]

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode ids to text, without special tokens."""
        return self.hf_tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_one(self, token: int) -> str:
        """Return the text that a token adds to a text before it, with its blank; special tokens as they are written."""
        before, text = self._word
        return self.hf_tokenizer.decode([*before, token], clean_up_tokenization_spaces=False)[len(text) :]

    @functools.cached_property
    def _word(self) -> tuple[list[int], str]:
        """A word's ids and their text, for tokens to come after."""
        ids = self._raw("a")
        return ids, self.hf_tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def decode_stream(self, blocks: Iterable[Sequence[int]], stop: Sequence[str] = ()) -> Iterator[str]:
        """Decode ids that come in blocks by a `TextStream`; yields the new text after each block, and the rest."""
        text = TextStream(self, stop)
        for block in blocks:
            yield text.add(block)
        yield text.end()

    def for_export(self) -> "PreTrainedTokenizerBase":
        """Return a `transformers` tokenizer to save, which itself puts `prefix_ids` before a text."""
        from tokenizers import processors

        tokenizer = copy.deepcopy(self.hf_tokenizer)
        if self.prefix_ids and files.around(tokenizer)[0] != self.prefix_ids:
            names = [self.entries[token] for token in self.prefix_ids]
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=[*names, "$A"],
                pair=[*names, "$A", "$B"],
                special_tokens=list(zip(names, self.prefix_ids, strict=True)),
            )
        return tokenizer

    def _render(self, prompt: Prompt, answer: str | None = None) -> str:
        """Render the chat template on this tokenizer's date: messages up to the answer, or with an answer.

        `apply_chat_template` cannot be used: it replaces a function among its arguments by a string, so templates would
        read the clock. A template that prints the time prints midnight.
        """
        from transformers.utils import chat_template_utils

        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        template = chat_template_utils._compile_jinja_template(self.hf_tokenizer.get_chat_template())
        return template.render(
            messages=turns,
            tools=None,
            documents=None,
            add_generation_prompt=answer is None,
            strftime_now=datetime.datetime.combine(self.date, datetime.time()).strftime,
            **self.hf_tokenizer.special_tokens_map,
        )

    def _sample_chat(self, answered: bool) -> str:
        """A chat of "QUESTION" and, if answered, "ANSWER"; empty if there is no template or it refuses."""
        if not self.hf_tokenizer.chat_template:
            return ""
        try:
            return self._render("QUESTION", "ANSWER" if answered else None)
        except _REFUSALS:  # reported when a prompt is encoded
            return ""

    @functools.cached_property
    def _warn_of_prefix(self) -> None:
        """Warn about prompts that already begin with the prefix: cached, so once per tokenizer."""
        names = "".join(self.entries[token] for token in self.prefix_ids)
        warn(f"a plain prompt starts with {names!r} already, like text from a chat template; it is not added again")

    @property
    def _name(self) -> str:
        return self.hf_tokenizer.name_or_path or "of this task"

    def _raw(self, text: str) -> list[int]:
        return self.hf_tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode(self, text: str, kind: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the {kind} {text[:60]!r} has half a surrogate pair at character {error.start}; remove it"
            ) from None
        tokens, unknown = self._raw(text), self.hf_tokenizer.unk_token_id
        if max(tokens, default=0) >= self.vocab_size:
            raise UserError(
                f"the {kind} {text[:60]!r} has the token {self.entries[max(tokens)]!r}, which is not in the model's"
                " embedding; remove it"
            )
        # GPT-2 also gives its eos token this name, but knows all bytes.
        if unknown in tokens and unknown != self.hf_tokenizer.eos_token_id:
            offsets = self.hf_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            begin, end = offsets[tokens.index(unknown)]
            piece = text[begin:end].strip() or text[begin:end]
            raise UserError(
                f"the model's vocabulary does not have {piece!r}, at character {text.index(piece, begin)} of the"
                f" {kind} {text[:60]!r}; write the {kind} in the words of its task"
            )
        return tokens


class TextStream:
    """The text of ids that come one after the other, up to the first stop string.

    An incomplete character is held back until its last byte has come, and what may be the beginning of a stop string
    until that is known. The work does not grow with the length of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._before: list[int] = []  # ids whose text has come: what the next ones look like depends on them
        self._new: list[int] = []  # ids after them, whose text may end within a character
        self._taken = 0  # characters of the new ids' text that have come
        self._text = ""  # that has come, but may begin a stop string
        self._ended = False

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that is certain now and was not before."""
        self._new += tokens
        piece = self._piece()
        sure = piece.rstrip("\ufffd")
        self._text += sure[self._taken :]
        self._taken = len(sure)
        if piece and piece == sure:
            self._before, self._new, self._taken = self._new, [], 0
        return self._cut(final=False)

    def end(self) -> str:
        """Return the rest."""
        self._text += self._piece()[self._taken :]
        return self._cut(final=True)

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._new])[len(before) :]

    def _cut(self, *, final: bool) -> str:
        if self._ended:
            return ""
        self._ended = stop_strings.contains(self._text, self._stop)
        whole = stop_strings.cut(self._text, self._stop)
        certain = whole if final or self._ended else stop_strings.certain(whole, self._stop)
        self._text = whole[len(certain) :]
        return certain


def check_same_tokens(ref: Tokenizer, guide: Tokenizer) -> None:
    """Raise a UserError unless the guide has every token of the reference, with the same id.

    Embedding sizes may differ, and the guide may have more tokens, since the reference never draws them; nor does it
    draw those past its embedding, which are not compared. Special tokens with another name in the guide only cause a
    warning if neither model uses them to stop, around texts or between them. Llama 3 and 3.1 differ in 249 of these.
    """
    used = {*ref.stop_ids, *ref.template_ids, *guide.template_ids}
    drawn = sorted(token for token in ref.entries if token < ref.vocab_size)
    differing = [token for token in drawn if guide.entries.get(token) != ref.entries[token]]
    renamed = [token for token in differing if token in (ref.special_ids & guide.special_ids) - used]
    if others := sorted({*differing} - {*renamed}):
        raise UserError(
            f"the guide's vocabulary is not the reference's: {len(others)} of {len(ref.entries)} entries differ"
            f" ({_first_differing(others, ref, guide)}); use a guide with the reference's tokenizer"
        )
    if renamed:
        warn(
            f"{len(renamed)} special tokens that neither model uses have other names in the guide"
            f" ({_first_differing(renamed[:1], ref, guide)})"
        )


def _first_differing(tokens: Sequence[int], ref: Tokenizer, guide: Tokenizer) -> str:
    return "; ".join(
        f"id {token} is {ref.entries[token]!r} in the reference and"
        f" {repr(guide.entries[token]) if token in guide.entries else 'nothing'} in the guide"
        for token in tokens[:3]
    )
