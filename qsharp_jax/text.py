"""Between text and token ids, through any `transformers` tokenizer, and whether two models' tokens are the same.

Of a model's folder it reads the tokenizer's files and the ids that end a response. Knows nothing about models or tasks.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jinja2
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qsharp_jax.errors import UserError

FORMATS = ("plain", "chat")
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer's folder has at least one of them


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenizer with this program's conventions: how a prompt begins, and what ends a response.

    Attributes:
      tokenizer: of any kind.
      prompt_format: "plain", the text itself, or "chat", one user turn of the tokenizer's chat template, up to where
        the answer begins.
      bos: a plain prompt starts with the bos token.
      stop_ids: a response ends at the first of these; by default the eos token and the one that ends a chat's turn.

    Raises:
      UserError: for the chat format without a chat template, or stop ids that the tokenizer does not have.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_format: str = "plain"
    bos: bool = True
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.prompt_format not in FORMATS:
            raise UserError(f"the prompt format is {self.prompt_format!r}; it must be one of {', '.join(FORMATS)}")
        if self.prompt_format == "chat" and not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {self._name} has no chat template; use the prompt format plain, or a folder with one"
            )
        if self.stop_ids is None:
            own = {self.tokenizer.eos_token_id, self.end_of_turn} - {None}
            object.__setattr__(self, "stop_ids", tuple(sorted(own)))
        for stop in self.stop_ids:
            if not 0 <= stop < self.vocab_size:
                raise UserError(f"the stop id {stop} is none of the tokenizer's; they are 0 .. {self.vocab_size - 1}")

    @classmethod
    def load(cls, folder: str | Path, *, prompt_format: str = "plain", stop_ids: Sequence[int] | None = None) -> "Text":
        """The tokenizer of a model's folder, with the bos token where the tokenizer's own defaults add it.

        Args:
          stop_ids: by default those of generation_config.json (else of config.json), with the tokenizer's own.

        Raises:
          UserError: if the folder has no tokenizer or a damaged one, and as the class does.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give the path of one with a model and its tokenizer")
        if not has_tokenizer(folder):
            raise UserError(
                f"{folder} has no tokenizer, for none of {', '.join(_FILES)} is there; put the tokenizer's files beside"
                " the weights"
            )
        try:
            # No code from the folder is run, and nothing is looked for elsewhere.
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the libraries below raise their own, down to a bare Exception
            words = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the tokenizer in {folder} cannot be read ({words}); put its files there anew") from error
        bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        text = cls(tokenizer, prompt_format, bos, None if stop_ids is None else tuple(stop_ids))
        if stop_ids is None:
            # A config made for another vocabulary may list ids that are no tokens here: these are never drawn.
            listed = {token for token in _listed_stop_ids(folder) if 0 <= token < text.vocab_size}
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
        if not self.tokenizer.chat_template:
            return None
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            written = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError):  # a template may refuse; a prompt then says so
            return None
        after = self.tokenizer(written.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"]
        special = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        return next((token for token in after if token in special), None)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The prompt's ids in the prompt format.

        Raises:
          UserError: for a word or symbol that the vocabulary does not have, or that the chat template refuses.
        """
        if self.prompt_format == "chat":
            turns = [{"role": "user", "content": prompt}]
            try:
                written = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except (jinja2.TemplateError, TypeError, ValueError) as error:
                words = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(
                    f"the chat template of the tokenizer {self._name} refuses a prompt ({words}); mend it, or use the"
                    " prompt format plain"
                ) from error
            return self._encode(written, "prompt")  # the template writes the bos token where there is to be one
        return [*([self.tokenizer.bos_token_id] if self.bos else []), *self._encode(prompt, "prompt")]

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
        """A tokenizer to be saved: its own defaults put the bos token where this class puts it."""
        tokenizer = copy.deepcopy(self.tokenizer)
        bos, token = tokenizer.bos_token, tokenizer.bos_token_id
        if self.bos and tokenizer("")["input_ids"][:1] != [token]:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, token)]
            )
        return tokenizer

    @property
    def _name(self) -> str:
        return self.tokenizer.name_or_path or "of this task"

    def _encode(self, written: str, what: str) -> list[int]:
        tokens, unknown = self.tokenizer(written, add_special_tokens=False)["input_ids"], self.tokenizer.unk_token_id
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


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def check_same_tokens(ref: Text, guide: Text) -> None:
    """That the guide knows every token of the reference, by the same id.

    The sizes of embeddings are not looked at: they may be padded. Further tokens of the guide do no harm, for the
    reference never draws them.

    Raises:
      UserError: naming the first three that differ.
    """
    differing = [token for token in sorted(ref.entries) if guide.entries.get(token) != ref.entries[token]]
    if differing:
        first = "; ".join(
            f"id {token} is {ref.entries[token]!r} in the reference and"
            f" {repr(guide.entries[token]) if token in guide.entries else 'nothing'} in the guide"
            for token in differing[:3]
        )
        raise UserError(
            f"the guide's vocabulary is not the reference's, {len(differing)} of {len(ref.entries)} entries differ"
            f" ({first}); use a guide with the reference's tokenizer"
        )


def _listed_stop_ids(folder: Path) -> list[int]:
    """The eos_token_id, a number or a list of them, of the first of two files that has one."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            raise UserError(f"{path} is damaged, for it is no JSON object; put it there anew") from None
        if listed is not None:
            listed = listed if isinstance(listed, list) else [listed]
            if not all(type(token) is int for token in listed):
                raise UserError(f"{path} has the eos_token_id {listed}; it must be a whole number or a list of them")
            return listed
    return []
