"""What every task shares: the problem, its split, and a word-level tokenizer made on the spot.

A problem's identity and split come from a hash of its content, so train and test are disjoint for every seed and count.
It knows nothing about any task's text, and like all tasks nothing about models.
"""

import dataclasses
import hashlib
import random
from collections.abc import Iterable
from typing import Any

import tokenizers
import transformers

SPLITS = ("train", "test")
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}

_TEST_SHARE = 5  # one problem in five is a test problem
_PATIENCE = 20_000  # draws in a row that may bring nothing new before a split counts as exhausted


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attributes:
    problem_id: the same for the same content, in every call and process.
    prompt: the text that the model sees.
    answer: the right final answer, in the form that the task's `parse` returns.
    """

    problem_id: str
    prompt: str
    answer: str


def content_id(content: str) -> str:
    """Stable identity of a problem: 16 hex digits of a hash of what makes it this problem and no other."""
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def split_of(problem_id: str) -> str:
    return "test" if int(problem_id, 16) % _TEST_SHARE == 0 else "train"


def generator(*name: Any) -> random.Random:
    """A random stream of its own for each name, the same in every process."""
    return random.Random("/".join(map(str, name)))


def take(draws: Iterable[tuple[Problem, Any]], split: str, count: int, *, distinct: bool) -> list[tuple[Problem, Any]]:
    """The first `count` of the endless `draws` that belong to `split`, without repeats where `distinct`.

    A draw is a problem with whatever else its task needs to write about it.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    draws = iter(draws)
    taken, seen, fruitless = [], set(), 0
    while len(taken) < count:
        problem, rest = next(draws)
        if split_of(problem.problem_id) == split and problem.problem_id not in seen:
            taken.append((problem, rest))
            fruitless = 0
            if distinct:
                seen.add(problem.problem_id)
        elif (fruitless := fruitless + 1) == _PATIENCE:
            raise ValueError(
                f"found {len(taken)} {'distinct ' if distinct else ''}{split} problems, not the {count} asked for: "
                f"ask for fewer, or widen the task's settings"
            )
    return taken


def word_level_tokenizer(
    pieces: Iterable[str],
    pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer,
    decoder: tokenizers.decoders.Decoder,
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with one token for each of `pieces`; ids follow their order, after the special tokens.

    A piece that is not listed becomes <unk>, which callers refuse. Encoding adds no special tokens, and takes away the
    blanks around a text.
    """
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL_TOKENS.values(), *pieces])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, SPECIAL_TOKENS["unk_token"]))
    core.normalizer = tokenizers.normalizers.Strip()
    core.pre_tokenizer = pre_tokenizer
    core.decoder = decoder
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )
