"""Between text and token ids, through any `transformers` tokenizer, and whether two models' tokens are the same.

Knows nothing about models or tasks; `tokenizer_files.py` reads a tokenizer out of a model's folder.
"""

import copy
import dataclasses
import datetime
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jinja2
from tokenizers import processors
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

import qsharp_jax.data.tokenizer_files as files
from qsharp_jax.system.errors import UserError, warn

FORMATS = ("plain", "chat")


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenizer with this program's conventions: how a prompt begins, and what ends a response.

    Attributes:
      tokenizer: of any kind.
      prompt_format: "plain", the text itself, or "chat", one user turn of the tokenizer's chat template, up to where
        the answer begins.
      before: ids that a plain prompt starts with; by default the bos token, where the tokenizer has one.
      stop_ids: a response ends at the first of these; by default the eos token and the one that ends a chat's turn.
      date: what a chat template that writes the date takes for today.

    Raises:
      UserError: for the chat format without a chat template, or stop ids that the tokenizer does not have.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_format: str = "plain"
    before: tuple[int, ...] | None = None
    stop_ids: tuple[int, ...] | None = None
    date: datetime.date = dataclasses.field(default_factory=datetime.date.today)

    def __post_init__(self):
        if self.prompt_format not in FORMATS:
            raise UserError(f"the prompt format is {self.prompt_format!r}; it must be one of {', '.join(FORMATS)}")
        if self.prompt_format == "chat" and not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {self._name} has no chat template; use the prompt format plain, or a folder with one"
            )
        if self.before is None:
            bos = self.tokenizer.bos_token_id
            object.__setattr__(self, "before", () if bos is None else (bos,))
        if self.stop_ids is None:
            own = {self.tokenizer.eos_token_id, self.end_of_turn} - {None}
            object.__setattr__(self, "stop_ids", tuple(sorted(own)))
        for stop in self.stop_ids:
            if not 0 <= stop < self.vocab_size:
                raise UserError(f"the stop id {stop} is none of the tokenizer's; they are 0 .. {self.vocab_size - 1}")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        prompt_format: str = "plain",
        stop_ids: Sequence[int] | None = None,
        date: datetime.date | None = None,
    ) -> "Text":
        """The tokenizer of a model's folder: the ids of its tokenizer.json, and before a prompt what that puts there.

        Args:
          stop_ids: by default those of generation_config.json (else of config.json), with the tokenizer's own.
          date: by default today.

        Raises:
          UserError: if the folder has no tokenizer, a damaged one, or files that contradict each other, and as the
            class does.
        """
        tokenizer = files.read(folder)
        before, after = files.around(tokenizer)
        if after:
            names = "".join(tokenizer.convert_ids_to_tokens(list(after)))
            warn(f"the tokenizer in {folder} puts {names!r} after every text; prompts are given to the models without")
        text = cls(
            tokenizer,
            prompt_format,
            before,
            None if stop_ids is None else tuple(stop_ids),
            date or datetime.date.today(),
        )
        if stop_ids is None:
            # A config made for another vocabulary may list ids that are no tokens here: these are never drawn.
            listed = {token for token in files.listed_stop_ids(folder) if 0 <= token < text.vocab_size}
            text = dataclasses.replace(text, stop_ids=tuple(sorted({*text.stop_ids, *listed})))
        return text

    @functools.cached_property
    def entries(self) -> dict[int, str]:
        """Every token by its id, added ones among them."""
        return {token: entry for entry, token in self.tokenizer.get_vocab().items()}

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids from here on are no tokens: an embedding may have more rows, to fill up a round size."""
        return max(self.entries) + 1

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The id of the token that the chat template writes after an answer; None if it has none."""
        after = self._raw(self._sample_chat(answered=True).rpartition("ANSWER")[2])
        special = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        return next((token for token in after if token in special), None)

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """Tokens that no ordinary text becomes: they stand for something about it, such as its end."""
        added = {token for token, entry in self.tokenizer.added_tokens_decoder.items() if entry.special}
        return frozenset(added | {*self.tokenizer.all_special_ids})

    @functools.cached_property
    def written(self) -> frozenset[int]:
        """Tokens that stand around texts: before a prompt, bos and eos, and all that the chat template writes."""
        named = {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id} - {None}
        chats = [self._raw(self._sample_chat(answered)) for answered in (True, False)]
        return frozenset({*self.before, *named}.union(*chats))

    @functools.cached_property
    def writes_date(self) -> bool:
        """Prompts depend on the date: they are chats whose template reads the clock."""
        other = dataclasses.replace(self, date=datetime.date(2000, 1, 2))
        return self.prompt_format == "chat" and self._sample_chat(False) != other._sample_chat(False)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The prompt's ids in the prompt format.

        Raises:
          UserError: for a word or symbol that the vocabulary does not have, or that the chat template refuses.
        """
        if self.prompt_format == "chat":
            turns = [{"role": "user", "content": prompt}]
            try:
                written = self._render(turns, answer_begins=True)
            except (jinja2.TemplateError, TypeError, ValueError) as error:
                words = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(
                    f"the chat template of the tokenizer {self._name} refuses a prompt ({words}); mend it, or use the"
                    " prompt format plain"
                ) from error
            return self._encode(written, "prompt")  # the template writes the bos token where there is to be one
        tokens = self._encode(prompt, "prompt")
        if self.before and tuple(tokens[: len(self.before)]) == self.before:
            _ = self._say_bos_is_written
            return tokens
        return [*self.before, *tokens]

    def encode_response(self, response: str) -> list[int]:
        """The response's ids with the token that ends it: in a chat the end of a turn, else eos.

        Raises:
          UserError: for a word or symbol that the vocabulary does not have.
        """
        end = self.end_of_turn if self.prompt_format == "chat" else None
        end = self.tokenizer.eos_token_id if end is None else end
        return [*self._encode(response, "response"), *([] if end is None else [end])]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self, blocks: Iterable[Sequence[int]]) -> Iterator[str]:
        """The text of a response whose tokens come in blocks, each piece as soon as it is sure; together, `decode`.

        A character whose bytes have not all come is held back.
        """
        tokens, shown, whole = [], 0, ""
        for block in blocks:
            tokens += block
            whole = self.decode(tokens)
            sure = len(whole.rstrip("\ufffd"))
            yield whole[shown:sure]
            shown = max(shown, sure)
        yield whole[shown:]

    def for_other_programs(self) -> PreTrainedTokenizerBase:
        """A tokenizer to be saved: its own rule puts before a text what this class puts before a prompt."""
        tokenizer = copy.deepcopy(self.tokenizer)
        if self.before and files.around(tokenizer)[0] != self.before:
            names = [self.entries[token] for token in self.before]
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=[*names, "$A"],
                pair=[*names, "$A", "$B"],
                special_tokens=list(zip(names, self.before, strict=True)),
            )
        return tokenizer

    def _render(self, turns: Sequence[Mapping[str, str]], *, answer_begins: bool) -> str:
        """Turns as the chat template writes them, on this tokenizer's date.

        `apply_chat_template` would let the template read the clock: it replaces a function among its arguments by a
        word. A template may print the time of the day, too: midnight.
        """
        template = chat_template_utils._compile_jinja_template(self.tokenizer.get_chat_template())
        clock = datetime.datetime.combine(self.date, datetime.time())
        return template.render(
            messages=turns,
            tools=None,
            documents=None,
            add_generation_prompt=answer_begins,
            strftime_now=clock.strftime,
            **self.tokenizer.special_tokens_map,
        )

    def _sample_chat(self, answered: bool) -> str:
        """A question in the chat template, with its answer or up to it; empty without one, or where it refuses."""
        if not self.tokenizer.chat_template:
            return ""
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            return self._render(turns[: 1 + answered], answer_begins=not answered)
        except (jinja2.TemplateError, TypeError, ValueError):  # a prompt then says so
            return ""

    @functools.cached_property
    def _say_bos_is_written(self) -> None:
        """Warn about a prompt that is a template's text already: once for a tokenizer, however many prompts are."""
        names = "".join(self.entries[token] for token in self.before)
        warn(f"a plain prompt starts with {names!r} already, as a chat template's text does; it is not put there again")

    @property
    def _name(self) -> str:
        return self.tokenizer.name_or_path or "of this task"

    def _raw(self, written: str) -> list[int]:
        return self.tokenizer(written, add_special_tokens=False)["input_ids"]

    def _encode(self, written: str, what: str) -> list[int]:
        tokens, unknown = self._raw(written), self.tokenizer.unk_token_id
        # GPT-2 gives its eos token this name too, but knows all bytes.
        if unknown in tokens and unknown != self.tokenizer.eos_token_id:
            offsets = self.tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            begin, end = offsets[tokens.index(unknown)]
            piece = written[begin:end].strip() or written[begin:end]
            raise UserError(
                f"the model's vocabulary does not have {piece!r}, at character {written.index(piece, begin)} of the"
                f" {what} {written[:60]!r}; write the {what} in the words of its task"
            )
        return tokens


def check_same_tokens(ref: Text, guide: Text) -> None:
    """Check that the guide knows every token of the reference, by the same id.

    The sizes of embeddings are not looked at: they may be padded. Further tokens of the guide do no harm, for the
    reference never draws them. Special tokens that have another name in the guide are counted in a warning, where
    neither model uses them: not to stop, and not around or between texts. Llama 3 and 3.1 differ in 249 of these.

    Raises:
      UserError: naming the first three that differ.
    """
    used = {*ref.stop_ids, *ref.written, *guide.written}
    differing = [token for token in sorted(ref.entries) if guide.entries.get(token) != ref.entries[token]]
    renamed = [token for token in differing if token in (ref.special & guide.special) - used]
    if others := sorted({*differing} - {*renamed}):
        raise UserError(
            f"the guide's vocabulary is not the reference's, {len(others)} of {len(ref.entries)} entries differ"
            f" ({_first_differing(others, ref, guide)}); use a guide with the reference's tokenizer"
        )
    if renamed:
        warn(
            f"{len(renamed)} special tokens that neither model uses have other names in the guide"
            f" ({_first_differing(renamed[:1], ref, guide)})"
        )


def _first_differing(tokens: Sequence[int], ref: Text, guide: Text) -> str:
    return "; ".join(
        f"id {token} is {ref.entries[token]!r} in the reference and"
        f" {repr(guide.entries[token]) if token in guide.entries else 'nothing'} in the guide"
        for token in tokens[:3]
    )
