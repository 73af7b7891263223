"""Collection as in DAgger: roll in with the current policy up to a random switch, finish with `pi_ref`, judge.

arXiv 2502.20548, Algorithm 1, lines 3-6. Shapes: B rows, N new tokens. It knows nothing about training or files other
than shards of rollouts.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from qsharp_jax import dataset, processes, sharding
from qsharp_jax.dataset import Rollout
from qsharp_jax.generate import Generation, Guide, for_decoding, generate
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueModel
from qsharp_jax.progress import Bar
from qsharp_jax.tasks import Problem
from qsharp_jax.text import Text


def sample(
    ref: LanguageModel,
    guide: Guide | None,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: np.ndarray,
    batch_size: int,
    samples: int = 1,
    name: str | None = None,
    **settings: Any,
) -> Generation:
    """`generate` for any number of prompts, in batches of one shape, those of like length together.

    Args:
      seeds: [rows], one a row; rows are the prompts' samples, a prompt's next to each other.
      batch_size: rows of a batch, rounded down to whole prompts, and up to what a mesh divides; the last is filled up
        with rows that generate nothing.
      samples: responses to each prompt.
      name: of the progress bar; none is shown without it.
      settings: of `generate`; arrays have one entry a row.
    """
    ref, guide = for_decoding(ref), None if guide is None else for_decoding(guide)
    settings.setdefault("budget", settings["max_new_tokens"])
    rows = len(prompts) * samples
    per_row = {key: np.broadcast_to(settings.pop(key), (rows,)) for key in PER_ROW if key in settings}
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    step = max(1, batch_size // samples)
    divisor = sharding.round_rows(1)
    while step * samples % divisor:
        step += 1
    parts = []
    for begin in Bar(range(0, len(prompts), step), name, disable=name is None):
        batch = order[begin : begin + step]
        filled = np.resize(batch, step)
        picked = _rows_of(filled, samples)
        controls = {key: array[picked] for key, array in per_row.items()}
        kept = len(batch) * samples
        controls["budget"] = np.where(np.arange(len(picked)) < kept, controls["budget"], 0)
        part = generate(
            ref,
            guide,
            [prompts[prompt] for prompt in filled],
            rng=seeds[picked],
            samples=samples,
            **controls,
            **settings,
        )
        parts.append({key: array if array is None else array[:kept] for key, array in vars(part).items()})
    back = np.argsort(_rows_of(order, samples))
    return Generation(
        **{
            key: None if array is None else np.concatenate([part[key] for part in parts])[back]
            for key, array in parts[0].items()
        }
    )


def _rows_of(prompts: np.ndarray, samples: int) -> np.ndarray:
    return (prompts[:, None] * samples + np.arange(samples)).reshape(-1)


PER_ROW = ("eta", "temperature", "top_p", "top_k", "budget")


def collect(
    ref: LanguageModel,
    guide: ValueModel | None,
    task: ModuleType,
    text: Text,
    problems: Sequence[Problem],
    folder: Path,
    *,
    number: int,
    samples: int,
    eta: float,
    shard_rows: int,
    batch_size: int,
    seed: int,
    **settings: Any,
) -> None:
    """Writes `samples` judged rollouts of every problem to shards in `folder`, leaving shards that are there alone.

    A rollout depends on the seed, the round and its own place in it, so a collection that was stopped anywhere and
    started again ends with the same records as one that never stopped. Several processes take shards in turn, each
    decoding for itself, and all return when the last has done.

    Args:
      guide: of the roll-in; None in round 1, where `pi_ref` generates everything.
      number: of the round, from 1.
      eta: of the roll-in.
      shard_rows: rollouts in a shard, rounded down to whole problems; what is lost at most when the program is killed.
      settings: of `generate`, for roll-in and roll-out alike.
    """
    settings = settings | {"record": ()}
    step = max(1, shard_rows // samples)
    for shard, begin in enumerate(Bar(range(0, len(problems), step), f"round {number}: collect")):
        others = shard % jax.process_count() != jax.process_index()
        if others or dataset.shard_path(folder, shard).exists():
            continue
        asked = [text.encode_prompt(problem.prompt) for problem in problems[begin : begin + step]]
        part = [problem for problem in problems[begin : begin + step] for _ in range(samples)]
        prompts = [prompt for prompt in asked for _ in range(samples)]
        # Three numbers a rollout: seeds of roll-in and roll-out, and the place of the switch.
        places = range(begin * samples, begin * samples + len(part))
        draws = np.stack([np.random.SeedSequence((seed, number, place)).generate_state(3) for place in places])
        if guide is None:
            switches, prefixes = np.zeros(len(part), np.int64), [[] for _ in part]
            ended = np.zeros(len(part), bool)
        else:
            roll_in = sample(
                ref, guide, asked, samples=samples, seeds=draws[:, 0], batch_size=batch_size, eta=eta, **settings
            )
            switches = draw_switches(roll_in.lengths, draws[:, 2])
            prefixes = [roll_in.response(row)[:switch] for row, switch in enumerate(switches)]
            ended = switches == roll_in.lengths  # a response of one token leaves nothing for pi_ref
        roll_out = sample(
            ref,
            None,
            # Without a roll-in a problem's samples start from one and the same prompt.
            asked if guide is None else [[*p, *prefix] for p, prefix in zip(prompts, prefixes, strict=True)],
            samples=samples if guide is None else 1,
            seeds=draws[:, 1],
            batch_size=batch_size,
            # The budget is the whole response's: decoding will not allow longer ones.
            budget=np.where(ended, 0, settings["max_new_tokens"] - switches),
            **settings,
        )
        rollouts = []
        for row, problem in enumerate(part):
            response = [*prefixes[row], *roll_out.response(row)]
            written = text.decode(response)
            rollouts.append(
                Rollout(
                    prompt_id=problem.problem_id,
                    round=number,
                    prompt_tokens=prompts[row],
                    response_tokens=response,
                    switch=int(switches[row]),
                    reward=task.reward(problem, written),
                    finished=bool(roll_out.finished[row] or (ended[row] and roll_in.finished[row])),
                    eta=float("inf") if guide is None else eta,
                    seed=int(draws[row, 1]),
                    text=written,
                )
            )
        dataset.write_shard(folder, shard, rollouts)
    processes.wait_for_all(f"rollouts of round {number}")


def draw_switches(lengths: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Uniform in 1 .. length - 1 of each roll-in's actual response, from 32 random bits each.

    At least one token is kept, and at least one is left for `pi_ref` to choose (but for a response of one token).
    """
    return 1 + draws.astype(np.int64) * np.maximum(lengths - 1, 1) // 2**32


def statistics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of one round: rollouts, mean reward, mean response tokens, share finished, labelled share of response tokens."""
    lengths = np.asarray([len(rollout.response_tokens) for rollout in rollouts])
    labelled = lengths - np.asarray([rollout.first_label for rollout in rollouts])
    return {
        "rollouts": len(rollouts),
        "reward": float(np.mean([rollout.reward for rollout in rollouts])),
        "response_tokens": float(lengths.mean()),
        "finished": float(np.mean([rollout.finished for rollout in rollouts])),
        "labelled": float(labelled.sum() / lengths.sum()),
    }
