"""Shared by all tasks: the problem, its split, random streams, and word-level tokenizers.

A problem's identity and split come from a hash of its content, so train and test are disjoint for every seed and count.
"""

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qsharp_jax.system.chat import Prompt

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "test")
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}

_TEST_SHARE = 5  # one problem in five is a test problem
_PATIENCE = 20_000  # draws in a row without a new problem before a split counts as exhausted


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem of a task."""

    problem_id: str  # the same for the same content, in every call and process
    prompt: Prompt  # the text that the model sees, or the messages of a chat
    answer: str  # the correct final answer, in the form that the task's `parse` returns; empty where there are none
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # what else a reward is given


def content_id(content: str) -> str:
    """Return 16 hex digits of a hash of a problem's content."""
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def split_of(problem_id: str) -> str:
    return "test" if int(problem_id, 16) % _TEST_SHARE == 0 else "train"


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")


def generator(*name: Any) -> random.Random:
    """Return the random stream of a name, the same in every process."""
    return random.Random("/".join(map(str, name)))


def take(draws: Iterator[tuple[Problem, Any]], split: str, count: int, *, distinct: bool) -> list[tuple[Problem, Any]]:
    """Take the first `count` of the endless `draws` that belong to `split`, without repeats if `distinct`.

    Each draw is a problem with whatever else its task needs to write about it. An unknown split, or too few problems,
    is a ValueError.
    """
    check_split(split)
    taken: list[tuple[Problem, Any]] = []
    seen, fruitless = set(), 0
    while len(taken) < count:
        problem, rest = next(draws)
        if split_of(problem.problem_id) == split and problem.problem_id not in seen:
            taken.append((problem, rest))
            fruitless = 0
            if distinct:
                seen.add(problem.problem_id)
        elif (fruitless := fruitless + 1) == _PATIENCE:
            raise ValueError(
                f"found {len(taken)} {'distinct ' if distinct else ''}{split} problems, not the {count} asked for; "
                f"ask for fewer, or widen the task's settings"
            )
    return taken


def word_level_tokenizer(
    pieces: Iterable[str],
    pre_tokenizer: "tokenizers.pre_tokenizers.PreTokenizer",
    decoder: "tokenizers.decoders.Decoder",
) -> "PreTrainedTokenizerFast":
    """Build a tokenizer with one token per piece; ids follow their order, after the special tokens.

    Other pieces become <unk>, which callers refuse. Encoding adds no special tokens and strips blanks around a text.
    """
    import tokenizers
    import transformers

    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL_TOKENS.values(), *pieces])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, SPECIAL_TOKENS["unk_token"]))
    core.normalizer = tokenizers.normalizers.Strip()
    core.pre_tokenizer = pre_tokenizer
    core.decoder = decoder
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )
