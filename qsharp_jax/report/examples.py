"""Held-out problems answered by pi_ref and by the learned method, side by side."""

import dataclasses

from qsharp_jax.evaluation import measure
from qsharp_jax.report.names import NAMES, eta_of
from qsharp_jax.run import config as configs
from qsharp_jax.run.workdir import Workdir

IN_TEXT = 3  # examples in report.md and on the terminal
KINDS = {  # problems by whether pi_ref and the learned method are right, and how many of each kind a page shows
    (False, True): ("only {learned} is right", 4),
    (True, False): ("only pi_ref is right", 2),
    (True, True): ("both are right", 2),
    (False, False): ("both are wrong", 2),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The first response of each method to one problem; `place` is the index of pi_ref's among its samples."""

    before: dict
    after: dict
    place: int

    @property
    def kind(self) -> tuple[bool, bool]:
        return self.before["reward"] > 0, self.after["reward"] > 0


@dataclasses.dataclass(frozen=True)
class Examples:
    """The responses to show.

    Attributes:
      method: the learned method.
      eta: at which it is shown.
      pairs: one per problem, in the problems' order.
      samples: all samples of pi_ref, and of the method at that eta, by name.
    """

    method: str
    eta: float
    pairs: list[Pair]
    samples: dict[str, list[dict]]


def find(workdir: Workdir, number: int) -> Examples | None:
    """Find the examples at the run's own eta, or else the smallest that was measured; None without samples of both."""
    method = workdir.config.algorithm
    paths = [measure.samples_path(workdir, name, round_) for name, round_ in (("pi_ref", 0), (method, number))]
    if not all(path.exists() for path in paths):
        return None
    unguided, guided = map(measure.read_samples, paths)
    etas = {eta_of(sample) for sample in guided}
    eta = configs.kl_weight(workdir.config)
    eta = eta if eta in etas else min(etas)
    guided = [sample for sample in guided if eta_of(sample) == eta]
    places, first = {}, {}
    for place, sample in enumerate(unguided):
        places.setdefault(sample["problem_id"], place)
    for sample in guided:
        first.setdefault(sample["problem_id"], sample)
    pairs = [Pair(unguided[places[name]], after, places[name]) for name, after in first.items() if name in places]
    return Examples(method, eta, pairs, {"pi_ref": unguided, method: guided})


def text(method: str, found: Examples | None) -> str:
    """Format a few problems as plain text, first those where the guide made the difference."""
    if found is None:
        return f"(no samples of both pi_ref and {NAMES[method]})"
    name = f"{NAMES[found.method]} eta {found.eta:<6g}"
    pairs = sorted(found.pairs, key=lambda pair: pair.before["reward"] - pair.after["reward"])
    # Two where it helped, and one from the middle, so that the text does not only flatter.
    chosen = pairs[: IN_TEXT - 1] + pairs[len(pairs) // 2 :][:1]
    verdict = {True: "right", False: "wrong"}
    return "\n\n".join(
        f"{pair.before['prompt']}\n"
        f"  {'pi_ref':<{len(name)}} {pair.before['response']}   ({verdict[pair.kind[0]]})\n"
        f"  {name} {pair.after['response']}   ({verdict[pair.kind[1]]}; answer {pair.after['answer']})"
        for pair in chosen
    )
