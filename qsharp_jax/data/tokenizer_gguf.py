"""The tokenizer in a GGUF file's metadata: byte-level BPE with the splitting of texts that its name stands for."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qsharp_jax.system import gguf
from qsharp_jax.system.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")


class _Rules(NamedTuple):
    """The rules of a tokenizer that a file only names, by its `tokenizer.ggml.pre`.

    Attributes:
      split: the pattern of the pieces that merges stay within; None: GPT-2's.
      digits: each digit is such a piece.
      nfc: texts are normalized to Unicode's form C.
      whole: a piece that is a token is that token, whatever the merges.
      bos: a text begins with the bos token, unless the file says otherwise.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False


_LLAMA3_RULES = _Rules(_LLAMA3, whole=True, bos=True)
_RULES = {
    "gpt-2": _Rules(),
    "smollm": _Rules(digits=True),
    "qwen2": _Rules(_QWEN2, nfc=True),
    "llama-bpe": _LLAMA3_RULES,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
}
# Tokens that end a text, a turn or a message in one family or another: files often name only one of a model's.
_ENDS = frozenset(
    ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "</s>")
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # types of tokens
_ROLES = dict(
    bos_token="tokenizer.ggml.bos_token_id",
    eos_token="tokenizer.ggml.eos_token_id",
    unk_token="tokenizer.ggml.unknown_token_id",
    pad_token="tokenizer.ggml.padding_token_id",
)


def read(path: Path) -> "PreTrainedTokenizerBase":
    """Read the tokenizer of a GGUF file. Tokens that only fill up the embedding are left out.

    Raises:
      UserError: if it has none, a damaged one, or one of another kind.
    """
    from transformers import PreTrainedTokenizerFast

    metadata = gguf.read(path).metadata
    kind, name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or name not in _RULES:
        raise UserError(
            f"{path} has a tokenizer of the kind {kind!r}, {name!r}, and 'gpt2' with {', '.join(_RULES)} can be read;"
            " put the file into a folder with the model's tokenizer.json, and give the folder"
        )
    try:
        core = _core(metadata, _RULES[name])
        tokens = metadata["tokenizer.ggml.tokens"]
        roles = {role: tokens[metadata[key]] for role, key in _ROLES.items() if key in metadata}
        template = metadata.get("tokenizer.chat_template")
        return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, name_or_path=str(path), **roles)
    except Exception as error:  # the libraries below raise their own, down to a bare Exception
        raise UserError(f"cannot read the tokenizer in {path} ({first_line(error)}); download it again") from error


def _core(metadata: Mapping[str, Any], rules: _Rules) -> "Tokenizer":
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab, merges, ignore_merges=rules.whole))
    if rules.nfc:
        core.normalizer = normalizers.NFC()
    pieces = [pre_tokenizers.Digits(individual_digits=True)] if rules.digits else []
    pieces += [pre_tokenizers.Split(Regex(rules.split), "isolated")] if rules.split else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rules.split)
    core.pre_tokenizer = pre_tokenizers.Sequence([*pieces, byte_level])
    core.decoder = decoders.ByteLevel()
    added = {_CONTROL: True, _USER_DEFINED: False}  # and whether it is special
    core.add_tokens(
        [
            AddedToken(token, normalized=False, special=added[kind])
            for token, kind in zip(tokens, types, strict=True)
            if kind in added
        ]
    )
    first, last = (
        [metadata[f"tokenizer.ggml.{name}_token_id"]]
        if metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        else []
        for name, default in (("bos", rules.bos), ("eos", False))
    )
    if first or last:
        bos, eos = [tokens[token] for token in first], [tokens[token] for token in last]
        core.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", "$B", *eos],
            special_tokens=[(tokens[token], token) for token in first + last],
        )
    return core


def stop_ids(path: Path) -> list[int]:
    """Return the ids that end a text, a turn or a message: those that a file names, and control tokens known to."""
    metadata = gguf.read(path).metadata
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    named = {metadata[key] for key in keys if key in metadata}
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    control = (token for token, kind in enumerate(kinds) if kind == _CONTROL)
    known = {token for token in control if metadata["tokenizer.ggml.tokens"][token] in _ENDS}
    return sorted(named | known)
