"""`evaluate`: reward against KL of a guide at several eta, beside the reference, in memory."""

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qsharp_jax import rollouts
from qsharp_jax.algorithms.registry import ALGORITHMS, DEFAULT
from qsharp_jax.data.batches import Example
from qsharp_jax.decoding import Guide as Guides
from qsharp_jax.decoding import row_seeds
from qsharp_jax.evaluation import measure, score
from qsharp_jax.evaluation.samples import judged
from qsharp_jax.models.value import ValueModel
from qsharp_jax.notebook.generating import check_counts, of_model, rows_of, text_of
from qsharp_jax.notebook.guides import AnyGuide, for_reference
from qsharp_jax.notebook.inputs import Prompts, Reward, judge, to_problems
from qsharp_jax.report import plots, tables
from qsharp_jax.run.folders import Loaded
from qsharp_jax.run.schema import ETAS
from qsharp_jax.sampling import Sampling
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.settings import check
from qsharp_jax.tasks.rewards import FEWEST

ROWS, BUCKET = 16, 64  # of scored batches: responses, and tokens of which widths are multiples
MOST_FAILURES = 0.1  # share of the responses without a reward, above which an evaluation stops, from FEWEST on


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Reward and KL of a reference and a guide. A notebook shows it as a table.

    Attributes:
      rows: a dict per method and eta: "reward", "kl", "response_tokens", "finished", ..., each with its interval in
        NAME_low and NAME_high, and paired differences as "reward_minus_pi_ref".
      samples: every response, with its "prompt", "reward", "kl" and "eta".
      how: how the numbers were computed.
    """

    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    how: str

    def table(self) -> str:
        """Return the table as text."""
        return tables.markdown(tables.frontier_lines(self.rows))

    def figure(self) -> plots.Plot:
        """Draw reward against KL; a notebook shows the figure, and `savefig` writes it."""
        return plots.plot(lambda axes: plots.frontier(axes, self.rows))

    def __repr__(self) -> str:
        return f"{self.table()}\n\n{self.how}"

    def _repr_html_(self) -> str:
        return f"{tables.to_html(tables.frontier_lines(self.rows))}\n<p>{self.how}</p>"


def evaluate(
    ref: Loaded,
    guide: AnyGuide,
    prompts: Prompts,
    reward: Reward | Sequence[Reward],
    *,
    etas: float | Sequence[float] = (0.5, 0.2, 0.1, 0.05),
    samples: int = 4,
    weights: Sequence[float] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure reward and KL of a guide at several eta, of the reference, and of best of n by the guide.

    Args:
      ref, guide: as in `generate`.
      prompts: that the guide was not trained on, such as `Run.held_out`; otherwise as in `train_guide`.
      reward, weights: as in `train_guide`.
      etas: weights of the KL, or one; small is strong guidance.
      samples: responses to each prompt, of the reference and at each eta.
      sampling: as in `generate`, but its eta is ignored; `Run.sampling` measures at the settings of a run. Without it
        temperature is 1, and responses have at most 256 tokens and no stop strings.
      seed: of everything that is random.

    Raises:
      UserError: for prompts, rewards or etas of another form, if too many responses have no reward, and as in
        `generate`.
    """
    check_counts(samples, seed)
    given = np.atleast_1d(np.asarray(etas)).tolist()
    check("etas", given, ETAS)
    problems, by_reward, sampling = to_problems(prompts), judge(reward, weights), of_model(ref, sampling)
    model = for_reference(guide, ref)
    encoded = [ref.tokenizer.encode_prompt(problem.prompt) for problem in problems]
    # Every other tilt is controlled decoding's, by one of its variants.
    method = DEFAULT if sampling.mode == DEFAULT else ALGORITHMS[DEFAULT].extra_modes[0]
    power = _power(model, sampling)
    method = method if power == 1 else f"{method}_power"

    def sample(name: str, model: Guides | None, etas: Sequence[float]) -> list[dict[str, Any]]:
        plan = list(itertools.product(problems, etas, range(samples)))
        settings = sampling if model is not None else dataclasses.replace(sampling, weights=None)  # which are of guides
        began = time.monotonic()
        generation = rollouts.sample(
            ref.ref,
            model,
            encoded,
            dataclasses.replace(settings, eta=np.asarray([eta for _, eta, _ in plan], np.float32)),
            seeds=row_seeds(seed, len(plan)),
            batch_size=rows_of(ref, model, encoded, sampling, len(plan)),
            samples=len(etas) * samples,
            name=f"evaluate {name}",
            tokenizer=ref.tokenizer,
        )
        each = (time.monotonic() - began) / len(plan)
        pending = [
            judged(text_of(ref, sampling, generation, row), by_reward, problem, eta, generation, row, now=0.0)
            for row, (problem, eta, _) in enumerate(plan)
        ]
        return [result()[0] | {"seconds": each} for result in pending]

    by_method = {("pi_ref", 0): sample("pi_ref", None, [math.inf])}
    _check_rewards(by_method)
    by_method[method, 1] = sample(method, model, given)
    _check_rewards(by_method)
    scored = None
    if isinstance(model, ValueModel):
        repeated = [tokens for tokens in encoded for _ in range(samples)]
        unguided = by_method["pi_ref", 0]
        examples = [Example(*pair) for pair in zip(repeated, (one["tokens"] for one in unguided), strict=True)]
        values = score.score(model, examples, rows=ROWS, bucket=BUCKET)
        scored = [{"values": of_response.tolist(), "seconds": 0.0} for of_response in values]
    statistics = measure.to_rows(by_reward, by_method, 1, scored, passes=(), majorities=(), power=power)
    return Evaluation(statistics, [one for part in by_method.values() for one in part], _how(len(problems), samples))


def _power(model: Guides | None, sampling: Sampling) -> float:
    """Return the power of one guide's tilt, which is its weight; 1 for several guides, and where rows differ."""
    if sampling.weights is None or not isinstance(model, ValueModel):
        return 1.0
    weights = np.unique(np.asarray(sampling.weights, float))
    return float(weights[0]) if len(weights) == 1 else 1.0


def _check_rewards(by_method: Mapping[tuple[str, int], Sequence[dict[str, Any]]]) -> None:
    """Raise a UserError if too many responses have no reward, or all of the latest method."""
    *_, latest = by_method.values()
    every = [one for part in by_method.values() for one in part]
    failed = sum(one["reward"] is None for one in every)
    too_many = len(every) >= FEWEST and failed > MOST_FAILURES * len(every)
    if too_many or all(one["reward"] is None for one in latest):
        raise UserError(
            f"{failed} of {len(every)} responses have no reward, for reasons as those above; fix the reward function,"
            " and call evaluate again"
        )


def _how(problems: int, samples: int) -> str:
    return (
        f"Reward is the mean over {problems} prompts, each with the mean of its {samples} responses, and KL the exact"
        " KL(pi || pi_ref) summed over a response's tokens, in nats, before truncation; minus pi_ref is the difference"
        " on the same prompts. In parentheses 95% intervals by bootstrap over prompts. best_of_k is the reward of the"
        " one of k responses of pi_ref that the guide values most, pass_k the best reward of k responses."
    )
