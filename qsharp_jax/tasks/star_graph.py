r"""Path finding on star graphs, from "The pitfalls of next-token prediction" (Bachmann & Nagarajan 2024).

G(d, l): d arms leave the start node, each path has l nodes counting the start, the goal ends one arm. The prompt lists
the d*(l-1) edges shuffled, "a,b|c,d|.../start,goal="; the response is the path "start,...,goal". A model that only
learns to follow edges is correct with probability 1/d. Each node is one token; commas have none.

config: degree       d, number of arms, at least 2
        path_length  l, number of nodes on a path, at least 2
        num_nodes    node ids are drawn from 0..num_nodes-1 (the paper: 50)
        pretrain_on  "paths": correct paths (the paper's setting); "walks": down an arm chosen uniformly at random
"""

import itertools
import random
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qsharp_jax.system.chat import as_text
from qsharp_jax.tasks import base
from qsharp_jax.tasks.base import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FINITE = SYMBOLIC = False

_PRETRAIN_ON = ("paths", "walks")


def check(config: Any) -> None:
    if config.degree < 2:
        raise ValueError(f"degree is {config.degree}; a star graph needs at least 2 arms")
    if config.path_length < 2:
        raise ValueError(f"path_length is {config.path_length}; a path needs at least 2 nodes, start and goal")
    needed = 1 + config.degree * (config.path_length - 1)
    if config.num_nodes < needed:
        raise ValueError(
            f"num_nodes is {config.num_nodes}; {config.degree} arms with paths of {config.path_length} nodes "
            f"need at least {needed}"
        )
    if config.pretrain_on not in _PRETRAIN_ON:
        raise ValueError(f"pretrain_on is {config.pretrain_on!r}; it must be one of {', '.join(_PRETRAIN_ON)}")


def make_tokenizer(config: Any) -> "PreTrainedTokenizerFast":
    from tokenizers import Regex, decoders, pre_tokenizers

    check(config)
    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(",", "removed"), pre_tokenizers.Split(Regex("[0-9]+|[|/=]"), "isolated")]
    )
    # Put a comma before every number, then remove it where no number precedes it.
    decoder = decoders.Sequence(
        [decoders.Replace(Regex("^(?=[0-9])"), ","), decoders.Fuse(), decoders.Replace(Regex("(?<![0-9]),"), "")]
    )
    return base.word_level_tokenizer([*map(str, range(config.num_nodes)), *"|/="], pre_tokenizer, decoder)


def problems(config: Any, split: str, count: int, seed: int) -> list[Problem]:
    check(config)
    draws = _graphs(config, base.generator("star_graph", split, seed))
    return [problem for problem, _ in base.take(draws, split, count, distinct=True)]


def pretraining_texts(config: Any, count: int, seed: int) -> list[tuple[str, str]]:
    check(config)
    rng = base.generator("star_graph", "pretraining", seed)
    graphs = base.take(_graphs(config, rng), "train", count, distinct=False)
    if config.pretrain_on == "paths":
        return [(as_text(problem.prompt), problem.answer) for problem, _ in graphs]
    return [(as_text(problem.prompt), rng.choice(paths)) for problem, paths in graphs]


def parse(response: str) -> str | None:
    """Return the response itself if it is a list of nodes, else None."""
    return response if re.fullmatch(r"[0-9]+(,[0-9]+)*", response) else None


def reward(problem: Problem, response: str) -> float:
    """Return 1.0 for exactly the path from start to goal."""
    return float(response == problem.answer)


def _graphs(config: Any, rng: random.Random) -> Iterator[tuple[Problem, list[str]]]:
    """Yield endless graphs: the problem, and the paths from the start down every arm, the correct one first."""
    steps = config.path_length - 1
    while True:
        start, *nodes = rng.sample(range(config.num_nodes), 1 + config.degree * steps)
        arms = [[start, *nodes[i : i + steps]] for i in range(0, len(nodes), steps)]
        edges = [f"{a},{b}" for arm in arms for a, b in itertools.pairwise(arm)]
        query = f"/{start},{arms[0][-1]}="
        # Sorted, since the order in which the prompt lists the edges does not change the graph.
        content = "|".join(sorted(edges)) + query
        rng.shuffle(edges)
        paths = [",".join(map(str, arm)) for arm in arms]
        yield Problem(base.content_id(content), "|".join(edges) + query, paths[0]), paths
