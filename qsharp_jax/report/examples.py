"""Held-out problems answered by pi_ref and by the learned method, side by side."""

import dataclasses
from collections.abc import Callable

from qsharp_jax.evaluation import measure
from qsharp_jax.report.names import NAMES, eta_of
from qsharp_jax.run import config as configs
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.chat import as_text

IN_TEXT = 3  # examples in report.md and on the terminal


@dataclasses.dataclass(frozen=True)
class Pair:
    """The first response of each method to one problem; `place` is the index of pi_ref's among its samples."""

    before: dict
    after: dict
    place: int

    @property
    def gain(self) -> float:
        return self.after["reward"] - self.before["reward"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of pairs: a description, how many of them a page shows, and which pairs are of this kind."""

    words: str
    shown: int
    includes: Callable[[Pair], bool]


RIGHT_OR_WRONG = (
    Kind("only {learned} is right", 4, lambda pair: pair.gain > 0),
    Kind("only pi_ref is right", 2, lambda pair: pair.gain < 0),
    Kind("both are right", 2, lambda pair: pair.gain == 0 and pair.after["reward"] == 1),
    Kind("both are wrong", 2, lambda pair: pair.gain == 0 and pair.after["reward"] == 0),
)
GRADED = (
    Kind("{learned} has the greater reward", 4, lambda pair: pair.gain > 0),
    Kind("pi_ref has the greater reward", 2, lambda pair: pair.gain < 0),
    Kind("both have the same reward", 2, lambda pair: pair.gain == 0),
)


@dataclasses.dataclass(frozen=True)
class Examples:
    """The responses to show."""

    method: str  # the learned method
    eta: float  # the eta at which it was sampled
    pairs: list[Pair]  # one per problem, in the problems' order
    samples: dict[str, list[dict]]  # all samples of pi_ref, and of the method at that eta, by name

    @property
    def right_or_wrong(self) -> bool:
        """True if all rewards are 0 or 1; other rewards are shown as numbers."""
        return all(sample["reward"] in (0, 1) for samples in self.samples.values() for sample in samples)

    def verdict(self, sample: dict) -> str:
        if self.right_or_wrong:
            return "right" if sample["reward"] else "wrong"
        return f"reward {sample['reward']:g}"

    def by_kind(self) -> dict[Kind, list[Pair]]:
        """Group the pairs by kind; graded ones with the largest differences first."""
        if self.right_or_wrong:
            return {kind: list(filter(kind.includes, self.pairs)) for kind in RIGHT_OR_WRONG}
        pairs = sorted(self.pairs, key=lambda pair: -abs(pair.gain))
        return {kind: list(filter(kind.includes, pairs)) for kind in GRADED}


def find(workdir: Workdir, number: int) -> Examples | None:
    """Read the samples at the run's own eta, or else the smallest measured; None unless both methods have samples."""
    method = workdir.config.algorithm
    paths = measure.samples_path(workdir, "pi_ref", 0), measure.samples_path(workdir, method, number)
    if not all(path.exists() for path in paths):
        return None
    unguided, guided = map(measure.read_samples, paths)
    etas = {eta_of(sample) for sample in guided}
    eta = configs.kl_weight(workdir.config)
    eta = eta if eta in etas else min(etas)
    guided = [sample for sample in guided if eta_of(sample) == eta]
    places, first = {}, {}
    for place, sample in enumerate(unguided):
        if sample["reward"] is not None:
            places.setdefault(sample["problem_id"], place)
    for sample in with_reward(guided):
        first.setdefault(sample["problem_id"], sample)
    pairs = [Pair(unguided[places[name]], after, places[name]) for name, after in first.items() if name in places]
    return Examples(method, eta, pairs, {"pi_ref": with_reward(unguided), method: with_reward(guided)})


def with_reward(samples: list[dict]) -> list[dict]:
    """Drop the samples for which the reward function failed."""
    return [sample for sample in samples if sample["reward"] is not None]


def _answer(sample: dict) -> str:
    return f"; answer {sample['answer']}" if sample["answer"] else ""


def text(method: str, chosen: Examples | None) -> str:
    """Format a few problems as plain text, first those where the learned method improved most."""
    if chosen is None:
        return f"(no samples of both pi_ref and {NAMES[method]})"
    name = f"{NAMES[chosen.method]} eta {chosen.eta:<6g}"
    pairs = sorted(chosen.pairs, key=lambda pair: -pair.gain)
    # One is from the middle, or the last of a few, so that the text does not only flatter.
    best = IN_TEXT - 1
    return "\n\n".join(
        f"{as_text(pair.before['prompt'])}\n"
        f"  {'pi_ref':<{len(name)}} {pair.before['response']}   ({chosen.verdict(pair.before)})\n"
        f"  {name} {pair.after['response']}   ({chosen.verdict(pair.after)}{_answer(pair.after)})"
        for pair in pairs[:best] + pairs[max(len(pairs) // 2, best) :][:1]
    )
