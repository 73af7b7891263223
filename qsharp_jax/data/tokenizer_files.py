"""Reading a tokenizer from a model's folder, and the folder's rules for how texts begin and responses end."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qsharp_jax.data.tokenizer_gguf as in_gguf
from qsharp_jax.system import gguf
from qsharp_jax.system.errors import UserError, first_line, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OWN = "tokenizer.json"
_FILES = (_OWN, "tokenizer.model", "vocab.json")  # a tokenizer's folder has at least one of them


def has_tokenizer(folder: str | Path) -> bool:
    """Tell whether a folder holds a tokenizer's files, or is or holds a GGUF file."""
    return _has_files(Path(folder)) or gguf.find(folder) is not None


def _has_files(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def read(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Read the tokenizer of a folder, with the ids of its tokenizer.json if it has one.

    `AutoTokenizer` goes by the model's type: it turns every tokenizer of a Qwen 2 folder into a byte-level one with
    Qwen's pattern, and takes only the vocabulary from the file.

    A GGUF file's own tokenizer is read where no tokenizer's files lie in the folder.

    Raises:
      UserError: if the folder has no tokenizer, a damaged one, or files that contradict each other.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    if not _has_files(folder) and (file := gguf.find(folder)) is not None:
        return in_gguf.read(file)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of a model and its tokenizer")
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer: none of {', '.join(_FILES)} exists; put the tokenizer's files next to the"
            " weights"
        )
    # No code from the folder is run, and nothing is looked up online.
    options: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    try:
        if not (folder / _OWN).is_file():
            return AutoTokenizer.from_pretrained(str(folder), **options)
        own = Tokenizer.from_file(str(folder / _OWN))
        config = _read_json(folder / "tokenizer_config.json")
        listed = {int(token): entry["content"] for token, entry in (config.get("added_tokens_decoder") or {}).items()}
        if listed:  # this copy of the added tokens would replace those of tokenizer.json
            options["added_tokens_decoder"] = {}
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
    except UserError:
        raise
    except Exception as error:  # the libraries below raise their own, including a bare Exception
        words = f"cannot read the tokenizer in {folder} ({first_line(error)}); download its files again"
        raise UserError(words) from error
    entries = {token: entry for entry, token in own.get_vocab().items()}
    if tokenizer.eos_token is None:  # GPT-2's folders name no special tokens
        tokenizer.eos_token = next((entries[stop] for stop in listed_stop_ids(folder) if stop in entries), None)
    _check_tokens(folder, entries, tokenizer, listed)
    adds, puts = config.get("add_bos_token"), bool(around(tokenizer)[0])
    if isinstance(adds, bool) and adds != puts:
        warn(
            f"in {folder}, tokenizer_config.json says that add_bos_token is {json.dumps(adds)}, but {_OWN} puts"
            f" {'a token' if puts else 'nothing'} before a text; {_OWN} is used"
        )
    return tokenizer


def _check_tokens(
    folder: Path, entries: Mapping[int, str], tokenizer: "PreTrainedTokenizerBase", listed: Mapping[int, str]
) -> None:
    """Raise a UserError if a folder's other files have tokens that its tokenizer.json does not have.

    Padding tokens and the like are ignored, since nothing here uses them.

    Args:
      entries: the tokens of tokenizer.json, by id.
      tokenizer: read from all files together.
      listed: the added tokens of tokenizer_config.json, by id.
    """
    unused = {getattr(tokenizer, name) for name in ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")}
    more = sorted(tokenizer.get_vocab().keys() - {*entries.values()} - unused)
    differing = [token for token in sorted(listed) if entries.get(token) != listed[token]]
    if differing:
        own = repr(entries[differing[0]]) if differing[0] in entries else "nothing"
        what = f"id {differing[0]} is {listed[differing[0]]!r} in tokenizer_config.json and {own} in {_OWN}"
    elif more:
        what = f"{more[0]!r} is a token in its other files and not in {_OWN}"
    else:
        return
    raise UserError(f"the tokenizer in {folder} contradicts itself: {what}; use the files of one tokenizer")


def around(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a tokenizer itself puts before and after every text."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    for start in range(len(whole) - len(bare), -1, -1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def listed_stop_ids(folder: str | Path, base: str | Path | None = None) -> list[int]:
    """Return the eos_token_id, one or several, of generation_config.json, else of config.json, else of a GGUF file.

    Args:
      base: the folder or GGUF file of the model that an adapter in the folder changes, whose files come second.
    """
    models = [Path(folder)] if base is None else [Path(folder), Path(base)]
    for name, model in itertools.product(("generation_config.json", "config.json"), models):
        path = model / name
        listed = _read_json(path).get("eos_token_id")
        if listed is not None:
            listed = listed if isinstance(listed, list) else [listed]
            if not all(type(token) is int for token in listed):
                raise UserError(f"{path} has the eos_token_id {listed}; it must be an integer or a list of integers")
            return listed
    file = next(filter(None, map(gguf.find, models)), None)
    return [] if file is None else in_gguf.stop_ids(file)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError
        return entries
    except ValueError:
        raise UserError(f"{path} is damaged: it is not a JSON object; download it again") from None
