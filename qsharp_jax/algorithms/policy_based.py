"""The steps of algorithms that train the policy itself: sample, score, update, and save.

pi_theta starts as a copy of pi_ref, or as pi_ref's own arrays with a LoRA beside them. All methods maximize
E reward - eta KL(pi_theta || pi_ref). An on-policy method repeats three steps: the policy answers a batch of problems,
with pi_ref beside it in the decode loop; every token gets its targets; some updates follow. Several processes share the
problems of a batch, and learn from all of its rollouts.

Arrays about rollouts are [N, M]: N rollouts, the samples of a prompt next to each other, M new tokens at most, 0 past
a response's end. In a minibatch they are [B, T], each at the position of its token.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import rollouts, train
from qsharp_jax.algorithms.policy_scores import VALUE_HEAD, Numbers, PolicyBatch, Scorer, make_batch, score, scorer
from qsharp_jax.data.batches import Example, from_rollout
from qsharp_jax.data.records import Rollout, write_shard
from qsharp_jax.decoding import for_decoding
from qsharp_jax.models import lora
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.run.problems import judge, train_problems
from qsharp_jax.run.session import Session
from qsharp_jax.system import multihost, stop_strings
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks.base import Problem
from qsharp_jax.train import Trainer
from qsharp_jax.train.checkpoint import Checkpoints

DRAWN = ("tokens", "lengths", "finished", "log_probs", "ref_log_probs", "kl")  # fields of a `Generation`


# --- Rollouts -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Judged rollouts of one policy."""

    examples: list[Example]  # N prompts with responses and rewards
    samples: int  # number per prompt
    mask: np.ndarray  # [N, M] bool, true at response tokens
    # log_probs, ref_log_probs: [N, M] nats, of each token under the policy that drew it and under pi_ref
    log_probs: np.ndarray
    ref_log_probs: np.ndarray
    values: np.ndarray  # [N, M], the value head's V(s_t) of the state in which each token was drawn; 0 without a head

    @property
    def rewards(self) -> np.ndarray:
        """Rewards of whole responses, [N]."""
        return np.asarray([example.reward for example in self.examples])

    @property
    def token_rewards(self) -> np.ndarray:
        """The response's reward at its last token, 0 elsewhere, [N, M]."""
        at_end = np.arange(self.mask.shape[1]) == self.mask.sum(1, keepdims=True) - 1
        return np.where(at_end, self.rewards[:, None], 0.0)


# Largest mean difference in nats between the log-probabilities of sampling and training, which are computed by two
# programs, in the same dtype; by that dtype.
LIMITS = {"float32": 1e-4, "bfloat16": 0.05}
QUANTILE, OF_LIMIT = 0.99, 10  # so many tokens differ by at most so many times the limit of the mean


def check_gaps(gaps: np.ndarray, limit: float) -> None:
    """Raise a ValueError if the differences [n] in nats of tokens' log-probabilities are too large.

    Their mean may be the limit at most, and their 99% quantile ten times as much. Single tokens may differ by more: in
    bfloat16, some of many do.
    """
    mean, high = gaps.mean(), np.quantile(gaps, QUANTILE)
    if not (mean <= limit and high <= OF_LIMIT * limit):
        raise ValueError(
            f"the log-probabilities of sampling and training differ by {mean:.2g} nats in the mean, where the limit is"
            f" {limit:g}, and by {high:.2g} in one token of a hundred, where it is {OF_LIMIT * limit:g}"
        )


def fill_rewards(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Replace NaN by the mean reward of the same prompt's other responses, or where it has none, of all: [N] -> [N].

    With a baseline per prompt, such a response is neither better nor worse than its siblings, and leaves theirs alone.

    Args:
      rewards: with the `samples` of a prompt next to each other; not all NaN.
    """
    by_prompt = rewards.reshape(-1, samples)
    judged = ~np.isnan(by_prompt)
    counts = judged.sum(1, keepdims=True)
    means = np.where(judged, by_prompt, 0.0).sum(1, keepdims=True) / np.maximum(counts, 1)
    return np.where(judged, by_prompt, np.where(counts > 0, means, np.nanmean(rewards))).reshape(-1)


def discounted_sum(x: np.ndarray, decay: float) -> np.ndarray:
    """y_t = x_t + decay y_{t+1} along the last axis: [N, M] -> [N, M]."""
    total = np.array(x, float)
    for t in range(x.shape[-1] - 2, -1, -1):
        total[..., t] += decay * total[..., t + 1]
    return total


def next_values(values: np.ndarray) -> np.ndarray:
    """V(s_{t+1}) at every t, 0 where the response has ended: [N, M] -> [N, M]."""
    return np.pad(values[:, 1:], ((0, 0), (0, 1)))


# --- Training -------------------------------------------------------------------------------------------------------


def start(session: Session, ref: LanguageModel, *, value_head: bool = False) -> Params:
    """Return `models.first_policy`'s parameters to train, with a value head that is 0 everywhere if asked for."""
    params = models.first_policy(session, ref)
    if value_head:
        width = models.ref_config(session).embed
        params = params | {VALUE_HEAD: {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros(1)}}
    return session.for_fitting(LanguageModel(params, models.ref_config(session))).params


def without_value_head(params: Params) -> Params:
    return {name: leaf for name, leaf in params.items() if name != VALUE_HEAD}


def split(session: Session, params: Params) -> tuple[Params, Params]:
    """Return the parameters that are learned, and pi_ref's, of which there are none without a LoRA."""
    return lora.split(params, (VALUE_HEAD,)) if session.config.fit.lora_rank else (params, {})


def finish(session: Session, params: Params) -> LanguageModel:
    """Return the policy on the mesh for decoding, cast to the dtype of sampling; it outlives further updates."""
    config = models.ref_config(session)
    learned, base = split(session, without_value_head(params))
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, config.compute_dtype), learned)
    return session.for_decoding(LanguageModel(lora.join(copy, base), config))


# (log_probs [B, T], values [B, T], batch, whole batch) -> (loss, metrics); parts of a batch add up, as in `train`
Loss = Callable[[jax.Array, jax.Array, PolicyBatch, PolicyBatch], tuple[jax.Array, dict[str, jax.Array]]]


@contextlib.contextmanager
def training(
    session: Session, number: int, params: Params, loss: Loss, *, total_steps: int, log_every: int, save_unit: int = 1
) -> Iterator[Trainer]:
    """Yield the trainer of round `number`, starting from `params` or its last checkpoint; saves the policy at the end.

    The first update donates what is learned of `params`. `save_unit` is as in `train.Loop`.
    """
    config, section = session.config.fit, session.config.policy
    optimizer, folder = train.make_optimizer(section.optimizer), session.workdir.guide_folder(number)
    with_value_head, by = VALUE_HEAD in params, scorer(session)
    learned, base = split(session, params)
    loop = train.Loop(
        name=f"round {number}: {session.config.algorithm}",
        total_steps=total_steps,
        log_every=log_every,
        save_every=config.save_every,
        save_unit=save_unit,
        log=session.workdir.append_metrics,
        flops=train.language_model_flops(models.ref_config(session)),
        profile=session.profile_folder(f"round_{number}"),
    )
    with (
        session.fitting(by.config.dtype),
        train.training(
            train.init_state(learned, optimizer, base, donate=True),
            loss_fn=functools.partial(_loss, by=by, loss=loss),
            optimizer=optimizer,
            checkpoints=Checkpoints(folder / "training" if with_value_head else folder),
            loop=loop,
            schedule=train.make_schedule(section.optimizer, total_steps),
            accumulate=config.accumulate,
        ) as trainer,
    ):
        yield trainer
        if not trainer.finished:
            trainer.finish()
    if with_value_head:  # the saved policy has none, like every algorithm's
        state = trainer.state
        Checkpoints(folder).save_result(state.replace(params=without_value_head(state.params), opt_state={}))


def _loss(
    params: Params, batch: PolicyBatch, whole: PolicyBatch | None = None, *, by: Scorer, loss: Loss
) -> tuple[jax.Array, dict]:
    return loss(*by(params, batch), batch, batch if whole is None else whole)


# --- On-policy rounds -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class OnPolicyTraining:
    """One round of a method that learns from rollouts of its own policy.

    The round's problems are divided into batches. Inside `resume`, for each batch number that `remaining` yields, the
    algorithm calls `sample`, computes the targets of all tokens, and updates on the `minibatches` of every epoch.
    """

    session: Session
    number: int  # the round
    ref: LanguageModel  # in the form for decoding
    prompts: int  # maximum number of problems per batch of rollouts
    samples: int  # rollouts per problem
    epochs: int = 1  # passes over each batch of rollouts
    greedy: bool = False  # take the likeliest token at each step, which is not a sample of the policy

    def __post_init__(self):
        problems, config = train_problems(self.session, self.number), self.session.config
        count = -(-len(problems) // self.prompts)
        bounds = np.linspace(0, len(problems), count + 1).round().astype(int)  # batches of nearly equal size
        self._problems = [problems[begin:end] for begin, end in itertools.pairwise(bounds)]
        largest = max(map(len, self._problems))
        groups = jax.process_count() // self.session.hosts_per_group
        self._decode_rows = min(config.collect.batch_size, -(-largest // groups) * self.samples)
        self._minibatches = -(-largest * self.samples // config.policy.batch_size)  # per epoch
        self._updates = self.epochs * self._minibatches  # per batch of rollouts

    @contextlib.contextmanager
    def resume(self, params: Params, loss: Loss) -> Iterator[None]:
        """Train from these parameters, or from the last checkpoint, which is always between batches of rollouts."""
        with training(
            self.session,
            self.number,
            params,
            loss,
            total_steps=len(self._problems) * self._updates,
            log_every=self._updates,
            save_unit=self._updates,
        ) as self._trainer:
            yield

    @property
    def params(self) -> Params:
        """The policy's parameters after the last update."""
        return self._trainer.state.model

    def remaining(self) -> Iterator[int]:
        """Yield the numbers of the batches of rollouts after the last checkpoint."""
        while not self._trainer.done:
            yield self._trainer.step // self._updates

    def sample(self, index: int) -> RolloutBatch:
        """Answer a batch of the problems with the current policy, judge and score the answers.

        Responses are drawn at the config's temperature, never truncated. Several processes, or groups that decode
        together, share the problems; every process gets the whole batch. The rollouts are written as a shard of the
        round's, and their statistics to the log. Responses without a reward have that of `fill_rewards` in what is
        returned.

        Raises:
          UserError: if no response has a reward, or the log-probabilities of decoding and training differ by more than
            `check_gaps` allows.
          Stopped: in every process, if one received a SIGTERM.
        """
        with self._trainer.between_steps() as params:
            began = time.monotonic()
            problems = self._problems[index]
            prompts = [models.tokenizer(self.session).encode_prompt(problem.prompt) for problem in problems]
            seeds = self._seeds(index, len(problems) * self.samples)
            drawn = self._decode(params, problems, prompts, seeds)
            records = self._records(problems, prompts, seeds, drawn)
            if self.session.workdir.writes:
                write_shard(self.session.workdir.rollouts(self.number), index, records)
            if np.isnan(drawn["rewards"]).all():
                raise UserError(
                    "no response of a batch has a reward; fix the reward function and run the same command again"
                )
            filled = fill_rewards(drawn["rewards"], self.samples).tolist()
            examples = [
                from_rollout(dataclasses.replace(record, reward=reward))
                for record, reward in zip(records, filled, strict=True)
            ]
            mask, log_probs, values = score(self.session, params, examples)
            gaps = np.abs(log_probs - drawn["log_probs"])[mask]
            self._check_gaps(index, gaps)
        reward, kl = float(np.nanmean(drawn["rewards"])), float(drawn["kl"].sum(1).mean())
        self._trainer.log(
            {
                "rollouts": len(records),
                "reward": reward,
                "kl": kl,
                "objective": reward - configs.kl_weight(self.session.config) * kl,
                "response_tokens": float(mask.sum(1).mean()),
                "finished": float(drawn["finished"].mean()),
                "log_prob_gap": float(gaps.max()),
                "sampling_seconds": time.monotonic() - began,
            }
        )
        return RolloutBatch(examples, self.samples, mask, log_probs, drawn["ref_log_probs"], values)

    def minibatches(self, rollout_batch: RolloutBatch, targets: Numbers) -> Iterator[PolicyBatch]:
        """Yield all rollouts in parts of nearly equal size, in a new order in every epoch of the round."""
        examples, config = rollout_batch.examples, self.session.config
        epoch = self._trainer.step // self._minibatches
        order = np.random.default_rng((self.session.seed(f"policy {self.number}"), epoch)).permutation(len(examples))
        width = -(-max(map(len, examples)) // config.fit.length_bucket) * config.fit.length_bucket
        for indices in np.array_split(order, self._minibatches):
            yield make_batch(examples, targets, indices, rows=config.policy.batch_size, width=width)

    def update(self, minibatch: PolicyBatch) -> None:
        """Take one step; errors as in `train.Trainer.update`."""
        self._trainer.update(minibatch)

    def _seeds(self, index: int, count: int) -> np.ndarray:
        """Return a seed per rollout, which depends only on the config's seed, the round and the batch's number."""
        return np.random.SeedSequence((self.session.seed("sample policy"), self.number, index)).generate_state(count)

    def _decode(
        self, params: Params, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], seeds: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Sample and judge: the arrays of `DRAWN`, and "rewards" [N], of all processes."""
        multihost.stop_if_told()
        session, part = self.session, {}
        policy = finish(session, params)
        mine = multihost.share(range(len(problems)), session.hosts_per_group)
        with multihost.apart():
            if mine:  # there may be more processes than problems
                rows = slice(mine.start * self.samples, mine.stop * self.samples)
                with session.decoding():
                    drawn = rollouts.sample(
                        self.ref,
                        for_decoding(policy),
                        prompts[mine.start : mine.stop],
                        dataclasses.replace(models.sampling(session), top_p=1.0, top_k=1 if self.greedy else 0),
                        samples=self.samples,
                        seeds=seeds[rows],
                        batch_size=self._decode_rows,  # padded, so that batches of similar size share a program
                        record=("log_probs", "kl"),
                        tokenizer=models.tokenizer(session),
                    )
                part = {name: getattr(drawn, name) for name in DRAWN}
                if multihost.leads(session.hosts_per_group):  # the rewards of the other processes are not gathered
                    answered = [problems[place] for place in mine for _ in range(self.samples)]
                    part["rewards"] = rollouts.rewards(
                        judge(session), models.tokenizer(session), answered, drawn, stop=session.config.generate.stop
                    )
        return multihost.gather_rows(part, session.hosts_per_group)

    def _records(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        seeds: np.ndarray,
        drawn: dict[str, np.ndarray],
    ) -> list[Rollout]:
        records, tokenizer, stop = [], models.tokenizer(self.session), self.session.config.generate.stop
        for row, (seed, reward) in enumerate(zip(seeds.tolist(), drawn["rewards"].tolist(), strict=True)):
            response = drawn["tokens"][row, : drawn["lengths"][row]].tolist()
            records.append(
                Rollout(
                    prompt_id=problems[row // self.samples].problem_id,
                    round=self.number,
                    prompt_tokens=prompts[row // self.samples],
                    response_tokens=response,
                    switch=len(response),  # pi_ref chose nothing
                    reward=None if math.isnan(reward) else reward,
                    finished=bool(drawn["finished"][row]),
                    eta=configs.kl_weight(self.session.config),
                    seed=seed,
                    text=stop_strings.cut(tokenizer.decode(response), stop),
                )
            )
        return records

    def _check_gaps(self, index: int, gaps: np.ndarray) -> None:
        dtypes = {models.ref_config(self.session).dtype, scorer(self.session).config.dtype}
        limit = self.session.config.policy.log_prob_limit or max(LIMITS[dtype] for dtype in dtypes)
        try:
            check_gaps(gaps, limit)
        except ValueError as error:
            raise UserError(
                f"{self.session.config.algorithm}, round {self.number}, batch {index}: {error}; compute both in"
                " float32, or raise config.policy.log_prob_limit"
            ) from None
