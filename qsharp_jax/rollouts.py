"""Collection as in DAgger: roll in with the current policy up to a random switch, finish with `pi_ref`, judge.

arXiv 2502.20548, Algorithm 1, lines 3-6. Shapes: B rows, N new tokens.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from qsharp_jax.data.records import Rollout, Rollouts, shard_path, with_reward, with_variation, write_shard
from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.decoding import RECORDED, ContinuousBatch, Generation, Guide, for_decoding, gives_values
from qsharp_jax.models import cpu_form, sharding
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueModel
from qsharp_jax.sampling import Sampling
from qsharp_jax.system import files, multihost, sigterm, stop_strings
from qsharp_jax.system.errors import Stopped
from qsharp_jax.system.progress import Bar
from qsharp_jax.tasks.base import Problem
from qsharp_jax.tasks.judging import Judgement
from qsharp_jax.tasks.rewards import AnyJudge


def sample(
    ref: LanguageModel,
    guide: Guide | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: np.ndarray,
    batch_size: int,
    samples: int = 1,
    name: str | None = None,
    record: Collection[str] = RECORDED,
    tokenizer: Tokenizer | None = None,
) -> Generation:
    """Sample responses to any number of prompts, in a loop of fixed rows (`ContinuousBatch`), in the prompts' order.

    Args:
      sampling: arrays have one entry per row; rows are the prompts' samples, a prompt's next to each other.
      seeds: [rows].
      batch_size: rows of the loop, rounded to what a mesh divides.
      samples: responses to each prompt.
      name: of the progress bar; none is shown without it.
      record, tokenizer: as in `generate`.

    Raises:
      Stopped: if a process with devices in the mesh that is set was told to stop meanwhile.
    """
    count = len(prompts) * samples
    order = sorted(range(len(prompts)), key=lambda prompt: len(prompts[prompt]))
    batch = ContinuousBatch(
        ref, guide, prompts, sampling, samples=samples, rows=batch_size, rng=seeds, record=record, tokenizer=tokenizer,
        order=(prompt * samples + sample for prompt in order for sample in range(samples)),
    )  # fmt: skip
    rows: dict[str, np.ndarray] = {}
    with Bar(None, name, total=count, disable=name is None, before="compiling") as bar:
        for places, part in batch:
            if sharding.anywhere(sigterm.requested()):
                raise Stopped
            for key, array in part.arrays.items():
                rows.setdefault(key, np.zeros((count, *array.shape[1:]), array.dtype))[places] = array
            bar.update(len(places))
    return Generation(**{field.name: rows.get(field.name) for field in dataclasses.fields(Generation)})


def rewards(
    judge: AnyJudge, text: Tokenizer, problems: Sequence[Problem], generation: Generation, *, stop: Sequence[str] = ()
) -> np.ndarray:
    """Judge responses to the problems beside them: [rows], nan for a response without a reward.

    Args:
      stop: stop strings, before which the text that is judged ends.

    Raises:
      Stopped: if this process was told to stop meanwhile.
    """

    def until_told(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if sigterm.requested():
                raise Stopped
            yield item

    def submit(row: int, problem: Problem) -> Callable[[], Judgement]:
        tokens = generation.response(row)
        response = stop_strings.cut(text.decode(tokens), stop)
        return judge.submit(problem, response, tokens=tokens, finished=bool(generation.finished[row]))

    pending = [submit(row, problem) for row, problem in enumerate(until_told(problems))]
    return np.asarray([judgement().reward for judgement in until_told(pending)], float)  # None becomes nan


def collect(
    ref: LanguageModel,
    guide: ValueModel | None,
    judge: AnyJudge,
    text: Tokenizer,
    problems: Sequence[Problem],
    folder: Path,
    sampling: Sampling,
    *,
    number: int,
    samples: int,
    shard_rows: int,
    batch_size: int,
    seed: int,
    longest: int = 0,
    together: int = 1,
) -> dict[str, int]:
    """Write `samples` judged rollouts of every problem to shards in `folder`, leaving shards that are there alone.

    A rollout depends on the seed, the round and its own place in it, so in float32 a collection that was stopped
    anywhere and started again ends with the same records as one that never stopped; in bfloat16 what it still has to
    collect may differ, as `ContinuousBatch` says. A rollout is judged, and a shard is written when
    the last of its rollouts has ended, while others are under way. Several processes share the shards, and all return
    when the last has done.

    Args:
      guide: of the roll-in; None in round 1, where `pi_ref` generates everything.
      sampling: of roll-in and roll-out alike; the eta is the roll-in's.
      number: of the round, from 1.
      shard_rows: rollouts in a shard, rounded down to whole problems.
      batch_size: rows that are decoded at once; roll-in and roll-out go on side by side, see `in_one_loop`: else each
        has a loop of half of them.
      longest: as of `ContinuousBatch`.
      together: processes that decode as one, on the mesh that is set; one of them writes.

    Returns:
      of all processes, the "row_steps" that were computed, and the "tokens" that came of them.
    """
    step = max(1, shard_rows // samples)
    count = -(-len(problems) // step)
    # What the first process sees is missing, for those that decode together have to do the same.
    missing = multihost.gather([[n for n in range(count) if not shard_path(folder, n).exists()]])[0]
    shards = {
        shard: range(shard * step, min((shard + 1) * step, len(problems)))
        for shard in multihost.share(missing, together)
    }
    asked = [problem for shard in shards.values() for problem in shard]
    prompts = [text.encode_prompt(problems[problem].prompt) for problem in asked]
    # Three numbers a rollout, by its place in the round: seeds of roll-in and roll-out, and the place of the switch.
    places = [problem * samples + sample for problem in asked for sample in range(samples)]
    draws = [np.random.SeedSequence((seed, number, place)).generate_state(3) for place in places]

    def rollout(
        place: int, prompt: list[int], switch: int, response: list[int], finished: bool, draw: np.ndarray
    ) -> Callable[[], Rollout]:
        """Start judging; calling the result waits for the judgement."""
        problem, written = problems[place // samples], stop_strings.cut(text.decode(response), sampling.stop)
        judgement = judge.submit(problem, written, tokens=response, finished=finished)
        return lambda: Rollout(
            prompt_id=problem.problem_id,
            round=number,
            prompt_tokens=prompt,
            response_tokens=response,
            switch=switch,
            reward=judgement().reward,
            finished=finished,
            eta=float("inf") if guide is None else sampling.eta,
            seed=int(draw[1]),
            text=written,
        )

    batches: list[ContinuousBatch] = []
    stream = responses(
        ref, guide, prompts, sampling, np.asarray(draws), batches, samples=samples, rows=batch_size, longest=longest,
        tokenizer=text,
    )  # fmt: skip

    def ended() -> Iterator[tuple[int, Callable[[], Rollout]]]:
        name = f"round {number}: collect"
        for index, switch, response, finished in Bar(stream, name, total=len(places), before="compiling"):
            if multihost.leads(together):
                place, prompt = places[index], prompts[index // samples]
                yield place, rollout(place, prompt, switch, response, finished, draws[index])

    in_shards = {shard: range(some.start * samples, some.stop * samples) for shard, some in shards.items()}
    write_shards(ended(), in_shards, functools.partial(write_shard, folder))
    multihost.wait_for_all(f"rollouts of round {number}")
    for shard in range(count):
        files.wait_for(shard_path(folder, shard))
    totals = multihost.gather([{"row_steps": batch.row_steps, "tokens": batch.tokens} for batch in batches], together)
    return {name: sum(total[name] for total in totals) for name in ("row_steps", "tokens")}


def write_shards(
    ended: Iterable[tuple[int, Callable[[], Any]]],
    shards: Mapping[int, Sequence[int]],
    write: Callable[[int, list[Any]], None],
) -> None:
    """Write every shard when the last of its items has come, while others are under way.

    Args:
      ended: each item's place, and a function that waits for the item, such as for a response's judgement.
      shards: the places of each shard's items, in the order in which they are written.
      write: of a shard's number and its items.
    """
    shard_of = {place: shard for shard, places in shards.items() for place in places}
    waiting = defaultdict(dict)  # by shard and place

    def write_one(shard: int, items: Mapping[int, Callable[[], Any]]) -> None:
        write(shard, [items[place]() for place in shards[shard]])

    with ThreadPoolExecutor(1) as writer:  # decoding goes on while a shard's last judgements are waited for
        writing = None
        for place, item in ended:
            shard = shard_of[place]
            waiting[shard][place] = item
            if len(waiting[shard]) == len(shards[shard]):
                if writing:
                    writing.result()
                writing = writer.submit(write_one, shard, waiting.pop(shard))
        if writing:
            writing.result()


def responses(
    ref: LanguageModel,
    guide: ValueModel | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    draws: np.ndarray,
    batches: list[ContinuousBatch],
    *,
    samples: int,
    rows: int,
    longest: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Iterator[tuple[int, int, list[int], bool]]:
    """Every response, as it ends: its index, its switch, its tokens, and whether it finished within its budget.

    Args:
      draws: [responses, 3] of 32 random bits: seeds of roll-in and roll-out, and the place of the switch.
      batches: gets the loops that decode them.
    """
    if not prompts:
        return
    ref, begun = for_decoding(ref), {}
    # Elsewhere than on a CPU, to keep what an evaluation keeps takes less time than to compile another program.
    record = recorded(guide) if in_one_loop() else ()
    batch = functools.partial(
        ContinuousBatch, ref, samples=samples, record=record, longest=longest, tokenizer=tokenizer
    )
    if guide is not None and in_one_loop():
        yield from _in_one_loop(batch, guide, prompts, sampling, draws, batches, rows=rows)
        return

    def roll_in() -> Iterator[tuple[int, list[int]]]:
        for indices, part in batches[0]:
            switches = draw_switches(part.lengths, draws[indices, 2])
            for row, index in enumerate(indices.tolist()):
                begun[index] = part.response(row)[: switches[row]]
                yield index, begun[index]

    starts = None
    if guide is not None:
        rows, starts = max(rows // 2, 1), roll_in()
        batches.append(batch(guide, prompts, sampling, rng=draws[:, 0], rows=rows))
    batches.append(batch(None, prompts, sampling, rng=draws[:, 1], rows=rows, starts=starts))
    for indices, part in batches[-1]:
        for row, index in enumerate(indices.tolist()):
            prefix = begun.pop(index, [])
            yield index, len(prefix), [*prefix, *part.response(row)], bool(part.finished[row])


def recorded(guide: Guide | None) -> tuple[str, ...]:
    """Return what an evaluation keeps of each step."""
    return ("kl", "values") if gives_values(guide) else ("kl",)


def in_one_loop() -> bool:
    """Return true if roll-in and roll-out share a loop, so that a step reads the reference once.

    A CPU waits for arithmetic rather than for memory, and the guide would run for the rows that roll out, too.
    """
    return not cpu_form.here()


def _in_one_loop(
    batch: Callable[..., ContinuousBatch],
    guide: ValueModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    draws: np.ndarray,
    batches: list[ContinuousBatch],
    *,
    rows: int,
) -> Iterator[tuple[int, int, list[int], bool]]:
    """`responses` with roll-ins at places 0 .. N - 1 of one loop, and roll-outs, of eta inf, at N .. 2 N - 1.

    A roll-out goes on in the row of its roll-in, from the caches of its tokens up to the switch.
    """
    count = len(draws)
    begun: dict[int, list[int]] = {}

    def roll_out(place: int, tokens: list[int]) -> tuple[int, int] | None:
        if place >= count:
            return None
        (switch,) = draw_switches(np.asarray([len(tokens)]), draws[[place], 2])
        begun[place] = tokens[:switch]
        return count + place, int(switch)

    eta = np.concatenate([np.full(count, sampling.eta), np.full(count, math.inf)])
    both = dataclasses.replace(sampling, eta=eta)
    seeds = draws[:, :2].T.reshape(-1)
    batches.append(batch(guide, [*prompts] * 2, both, rng=seeds, rows=rows, order=range(count), then=roll_out))
    for places, part in batches[-1]:
        for row in np.flatnonzero(places >= count).tolist():
            index = int(places[row]) - count
            prefix = begun.pop(index)
            yield index, len(prefix), [*prefix, *part.response(row)], bool(part.finished[row])


def draw_switches(lengths: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Uniform in 1 .. length - 1 of each roll-in's actual response, from 32 random bits each.

    At least one token is kept, and at least one is left for `pi_ref` to choose (but for a response of one token).
    """
    return 1 + draws.astype(np.int64) * np.maximum(lengths - 1, 1) // 2**32


def statistics(rollouts: Rollouts) -> dict[str, float]:
    """Summarize one round.

    Returns:
      the number of rollouts, mean reward, mean response tokens, share of finished responses, labeled share of response
      tokens, and share of the problems whose rollouts do not all have the same reward; "no_reward", the share of
      rollouts without one, if there are any. The mean reward is over the others.
    """
    judged = with_reward(rollouts)
    problems, varied = (len({*some.prompt_ids}) for some in (rollouts, with_variation(judged)))
    lengths = rollouts.columns["response_tokens"].lengths
    labeled = lengths - np.maximum(rollouts.first_labels, 0)
    failed = {"no_reward": 1 - len(judged) / len(rollouts)} if len(judged) < len(rollouts) else {}
    return failed | {
        "rollouts": len(rollouts),
        "reward": float(judged.rewards.astype(float).mean()) if judged else math.nan,
        "response_tokens": float(lengths.mean()),
        "finished": float(rollouts.columns["finished"].mean()),
        "labelled": float(labeled.sum() / lengths.sum()),
        "varied": varied / problems,
    }
