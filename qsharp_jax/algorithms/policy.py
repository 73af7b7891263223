"""What the methods that train the policy itself have in common: how it is sampled, scored, updated and kept.

pi_theta starts as a copy of pi_ref. On policy, it answers a lot of problems, with pi_ref beside it in the decode loop,
takes some steps on what it was paid, and answers the next. Several processes share a lot's problems, and learn from all
of its rollouts together. The objective of all methods is E reward - eta KL(pi_theta || pi_ref).

Numbers about rollouts are [N, M]: N rollouts, a prompt's samples next to each other, M new tokens at most, 0 past a
response's end. In a batch they are [B, T], each at its token's own place. It knows nothing about what a token is worth,
or what a loss makes of it: that is an algorithm's.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import rollouts, train
from qsharp_jax.data.batches import Example, from_rollout, length_batches, make_packed_batch
from qsharp_jax.data.records import Rollout, write_shard
from qsharp_jax.models import decoder, sharding
from qsharp_jax.models.attention import Attention
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.models.decoder import LanguageModel, Params
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.run.problems import judge, train_problems
from qsharp_jax.run.session import Session
from qsharp_jax.system import multihost
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks.base import Problem
from qsharp_jax.train.checkpoint import Checkpoints
from qsharp_jax.train.chunked import at_labelled

VALUE_HEAD = "value_head"  # beside the policy's parameters while an algorithm trains one with it
DRAWN = ("tokens", "lengths", "finished", "log_probs", "ref_log_probs", "kl")  # of a `Generation`

Numbers = Mapping[str, np.ndarray]  # [N, M] each


# --- Batches --------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class PolicyBatch:
    """Rows of prompt and response, right-padded, as a `Batch`, and numbers about the response's tokens.

    Attributes:
      tokens, segments, positions: [B, T] int32.
      response_mask: [B, T] bool.
      numbers: [B, T] float32 each, by name, 0 off the response.
    """

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array
    response_mask: jax.Array
    numbers: dict[str, jax.Array]


def make_batch(
    examples: Sequence[Example], numbers: Numbers, indices: Sequence[int | None], *, rows: int, width: int
) -> PolicyBatch:
    """Some of the examples, one a row, with their numbers; a row of None is padding, and so are those left over."""
    groups = [[] if index is None else [examples[index]] for index in indices]
    batch = make_packed_batch(groups, rows, width)
    placed = {name: np.zeros((rows, width), np.float32) for name in numbers}
    for row, index in enumerate(indices):
        if index is None:
            continue
        begin, end = len(examples[index].prompt), len(examples[index])
        for name, of in numbers.items():
            placed[name][row, begin:end] = of[index, : end - begin]
    return PolicyBatch(batch.tokens, batch.segments, batch.positions, batch.response_mask, placed)


def a_token(x: jax.Array, batch: PolicyBatch, whole: PolicyBatch) -> jax.Array:
    """The mean of [B, T] over response tokens; of the whole batch's, where the batch is a part of its rows."""
    return jnp.where(batch.response_mask, x, 0).sum() / jnp.maximum(whole.response_mask.sum(), 1)


def a_response(x: jax.Array, batch: PolicyBatch, whole: PolicyBatch) -> jax.Array:
    """The mean over responses of [B, T] summed over their tokens, likewise."""
    return jnp.where(batch.response_mask, x, 0).sum() / jnp.maximum(whole.response_mask.any(1).sum(), 1)


# --- Log-probabilities and values -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scorer:
    """How a policy's log-probabilities are computed in training; hashable, a static argument.

    Attributes:
      config: the policy's shape.
      temperature: the policy is that of the logits divided by it.
      vocab_size: ids from here on pad the embedding; they have probability 0.
      detach_values: the gradient of V stops at the trunk, and the value head alone learns from it.
      remat, attend_by: see `decoder.forward`.
    """

    config: DecoderConfig
    temperature: float
    vocab_size: int
    detach_values: bool
    remat: decoder.Remat = "dots"
    attend_by: Attention = "xla"

    def __call__(self, params: Params, batch: PolicyBatch) -> tuple[jax.Array, jax.Array]:
        """log pi(y_t | s_t) in nats, and V(s_t) of the state before the token: [B, T] each, 0 off the response.

        Without a value head V is 0.
        """
        chex.assert_equal_shape([batch.tokens, batch.response_mask])
        hidden, _ = decoder.forward(
            params, self.config, batch.tokens, batch.segments, batch.positions,
            remat=self.remat, attend_by=self.attend_by, packed=False,
        )  # fmt: skip
        before, tokens, mask = hidden[:, :-1], batch.tokens[:, 1:], batch.response_mask[:, 1:]
        heads = {name: params[name] for name in ("embedding", "head") if name in params}
        log_probs = at_labelled(self._log_probs, heads, before, tokens, mask, width=self.config.vocab_size)
        values = jnp.zeros(mask.shape)
        if VALUE_HEAD in params:
            head = params[VALUE_HEAD]
            state = jax.lax.stop_gradient(before) if self.detach_values else before
            values = decoder.product(state, head["kernel"], jnp.float32)[..., 0] + head["bias"][0]
        return tuple(jnp.pad(jnp.where(mask, x, 0), ((0, 0), (1, 0))) for x in (log_probs, values))

    def _log_probs(self, heads: Params, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = decoder.logits(heads, self.config, hidden) / self.temperature
        logits = jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, logits, -jnp.inf)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def scorer(session: Session) -> Scorer:
    """In the dtype of the fit, and at the temperature that responses are sampled at."""
    fit = session.config.fit
    return Scorer(
        config=dataclasses.replace(models.ref_config(session), dtype=fit.dtype or models.ref_config(session).dtype),
        temperature=session.config.generate.temperature,
        vocab_size=models.tokenizer(session).vocab_size,
        detach_values=session.config.policy.detach_values,
        remat=fit.remat,
        attend_by=fit.attention,
    )


_score = jax.jit(Scorer.__call__, static_argnums=0)


def score(session: Session, params: Params, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether there is a token, its log-probability, and V of the state before it, [N, M] each.

    Several processes compute this together.

    Raises:
      Stopped: if one of them was told to stop.
    """
    most, bucket = session.config.generate.max_new_tokens, session.config.fit.length_bucket
    mask = np.arange(most) < np.asarray([len(example.response) for example in examples])[:, None]
    log_probs, values = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
    by, rows = scorer(session), sharding.round_rows(session.config.policy.batch_size)
    for width, indices in length_batches([len(example) for example in examples], rows=rows, bucket=bucket):
        multihost.stop_if_told()
        batch = sharding.place_rows(make_batch(examples, {}, indices, rows=rows, width=width))
        for numbers, found in zip((log_probs, values), _score(by, params, batch), strict=True):
            found = sharding.to_host(found)
            for row, index in enumerate(indices):
                begin, end = len(examples[index].prompt), len(examples[index])
                numbers[index, : end - begin] = found[row, begin:end]
    return mask, log_probs, values


# --- Rollouts of the policy -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A lot of judged rollouts of one policy.

    Attributes:
      examples: N prompts with responses and rewards.
      samples: of each prompt.
      mask: [N, M] bool, true at response tokens.
      log_probs, ref_log_probs: [N, M] nats, of each token under the policy that drew it and under pi_ref.
      values: [N, M], the value head's V(s_t) of the state that the token was drawn in; 0 without one.
    """

    examples: list[Example]
    samples: int
    mask: np.ndarray
    log_probs: np.ndarray
    ref_log_probs: np.ndarray
    values: np.ndarray

    @property
    def rewards(self) -> np.ndarray:
        """[N], of whole responses."""
        return np.asarray([example.reward for example in self.examples])

    @property
    def token_rewards(self) -> np.ndarray:
        """[N, M]: the response's reward at its last token, where it is paid."""
        last = np.arange(self.mask.shape[1]) == self.mask.sum(1, keepdims=True) - 1
        return np.where(last, self.rewards[:, None], 0.0)


def discounted_sum(x: np.ndarray, decay: float) -> np.ndarray:
    """y_t = x_t + decay y_{t+1} along the last axis: [N, M] -> [N, M]."""
    found = np.array(x, float)
    for place in range(x.shape[-1] - 2, -1, -1):
        found[..., place] += decay * found[..., place + 1]
    return found


def next_values(values: np.ndarray) -> np.ndarray:
    """V(s_{t+1}) at every t, 0 where the response has ended: [N, M] -> [N, M]."""
    return np.pad(values[:, 1:], ((0, 0), (0, 1)))


def sample(
    session: Session,
    ref: LanguageModel,
    params: Params,
    problems: Sequence[Problem],
    *,
    number: int,
    lot: int,
    samples: int,
    rows: int,
    greedy: bool = False,
) -> tuple[Sampled, dict[str, float]]:
    """Answers problems with the policy, judges and scores them; the records are a shard of the round's rollouts.

    Responses are drawn from the policy itself: at the config's temperature, never truncated. Several processes, or
    groups of them that decode together, share the problems, and every one gets the whole lot.

    Args:
      ref: in the form for decoding.
      params: of the policy, as they are trained.
      number, lot: of the round, and of the lot in it: rollouts depend on these, the seed and the policy only.
      rows: of a process's batch in decoding, which is filled up, so that lots of nearly one size share a program.
      greedy: the likeliest token at each step, which is no sample of the policy.

    Returns:
      the rollouts, and what is to be logged of them.

    Raises:
      UserError: if the log-probabilities of the decode loop and of the training differ by more than the limit.
      Stopped: in every process, if one was told to stop.
    """
    multihost.stop_if_told()
    began, text, section = time.monotonic(), models.tokenizer(session), session.config.policy
    policy = session.for_decoding(LanguageModel(without_value_head(params), models.ref_config(session)))
    seeds = np.random.SeedSequence((session.seed("sample policy"), number, lot)).generate_state(len(problems) * samples)
    prompts = [text.encode_prompt(problem.prompt) for problem in problems]
    mine = multihost.share(range(len(problems)), session.hosts_per_group)
    part: dict[str, np.ndarray] = {}
    with multihost.apart():
        if mine:  # there may be more processes than problems
            part = _answer(
                session,
                ref,
                policy,
                problems[mine.start : mine.stop],
                prompts[mine.start : mine.stop],
                seeds[mine.start * samples : mine.stop * samples],
                samples=samples,
                rows=rows,
                greedy=greedy,
            )
    drawn = multihost.gather_rows(part, session.hosts_per_group)
    records: list[Rollout] = []
    for row, seed in enumerate(seeds.tolist()):
        response = drawn["tokens"][row, : drawn["lengths"][row]].tolist()
        records.append(
            Rollout(
                prompt_id=problems[row // samples].problem_id,
                round=number,
                prompt_tokens=prompts[row // samples],
                response_tokens=response,
                switch=len(response),  # pi_ref chose nothing
                reward=float(drawn["rewards"][row]),
                finished=bool(drawn["finished"][row]),
                eta=configs.kl_weight(session.config),
                seed=seed,
                text=text.decode(response),
            )
        )
    if session.workdir.writes:
        write_shard(session.workdir.rollouts(number), lot, records)
    examples = [from_rollout(record) for record in records]
    mask, log_probs, values = score(session, params, examples)
    gap = float(np.abs(np.where(mask, log_probs - drawn["log_probs"], 0)).max())
    if not gap <= section.log_prob_limit:
        raise UserError(
            f"{session.config.algorithm}, round {number}, lot {lot}: the log-probabilities that tokens were sampled"
            f" with and those of the training differ by {gap:.2g} nats, and config.policy.log_prob_limit is"
            f" {section.log_prob_limit:g}; compute both in float32, or raise the limit"
        )
    kl = float(drawn["kl"].sum(1).mean())
    reward = float(np.mean([record.reward for record in records]))
    figures = {
        "rollouts": len(records),
        "reward": reward,
        "kl": kl,
        "objective": reward - configs.kl_weight(session.config) * kl,
        "response_tokens": float(mask.sum(1).mean()),
        "finished": float(drawn["finished"].mean()),
        "log_prob_gap": gap,
        "sampling_seconds": time.monotonic() - began,
    }
    return Sampled(examples, samples, mask, log_probs, drawn["ref_log_probs"], values), figures


def _answer(
    session: Session,
    ref: LanguageModel,
    policy: LanguageModel,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    seeds: np.ndarray,
    *,
    samples: int,
    rows: int,
    greedy: bool,
) -> dict[str, np.ndarray]:
    """Sample and judge this process's part of a lot: the arrays of `DRAWN`, and "rewards" [N].

    Raises:
      Stopped: if this process, or one that decodes together with it, was told to stop.
    """
    with session.decoding():
        drawn = rollouts.sample(
            ref,
            policy,
            prompts,
            dataclasses.replace(models.sampling(session), top_p=1.0, top_k=1 if greedy else 0),
            samples=samples,
            seeds=seeds,
            batch_size=rows,
            record=("log_probs", "kl"),
        )
    part = {name: getattr(drawn, name) for name in DRAWN}
    if multihost.leads(session.hosts_per_group):  # the others' rewards are not gathered
        each = [problem for problem in problems for _ in range(samples)]
        part["rewards"] = rollouts.rewards(judge(session), models.tokenizer(session), each, drawn)
    return part


# --- Training -------------------------------------------------------------------------------------------------------


def start(session: Session, ref: LanguageModel, *, value_head: bool = False) -> Params:
    """A copy of pi_ref's parameters; a value head beside them gives 0 everywhere."""
    params = models.first_policy(session, ref)
    if value_head:
        width = models.ref_config(session).embed
        params = params | {VALUE_HEAD: {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros(1)}}
    return session.for_fitting(LanguageModel(params, models.ref_config(session))).params


def without_value_head(params: Params) -> Params:
    return {name: leaf for name, leaf in params.items() if name != VALUE_HEAD}


# of (Sampled) -> what the loss needs to know about every token
Worth = Callable[[Sampled], Numbers]
# of (log_probs [B, T], values [B, T], batch, whole batch) -> (loss, metrics); parts of a batch add up, as in `train`
Loss = Callable[[jax.Array, jax.Array, PolicyBatch, PolicyBatch], tuple[jax.Array, dict[str, jax.Array]]]


class Lots:
    """The batches of a training on policy: `sample` makes a lot of rollouts, `[step]` is a part of the present one.

    A lot is gone through `epochs` times, cut into batches in another order each time.
    """

    def __init__(
        self,
        draw: Callable[[int, Params], tuple[Sampled, dict[str, float]]],
        worth: Worth,
        *,
        rollouts: int,
        rows: int,
        epochs: int,
        bucket: int,
        seed: int,
    ):
        """Args:
        draw: of (lot, parameters), gives the rollouts and what is to be logged.
        rollouts: of a lot, at most.
        rows: of a batch.
        bucket: widths are multiples of it, in tokens.
        """
        self._draw, self._worth, self._rows, self._bucket, self._seed = draw, worth, rows, bucket, seed
        self._batches = -(-rollouts // rows)
        self.steps = epochs * self._batches  # of a lot

    def sample(self, lot: int, params: Params) -> dict[str, float]:
        self._sampled, figures = self._draw(lot, params)
        self._numbers = self._worth(self._sampled)
        return figures

    def __getitem__(self, step: int) -> PolicyBatch:
        examples, (epoch, place) = self._sampled.examples, divmod(step, self._batches)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(examples))
        longest = max(map(len, examples))
        width = -(-longest // self._bucket) * self._bucket
        return make_batch(
            examples, self._numbers, np.array_split(order, self._batches)[place], rows=self._rows, width=width
        )


def improve(
    session: Session,
    number: int,
    ref: LanguageModel,
    params: Params,
    *,
    worth: Worth,
    loss: Loss,
    prompts: int,
    samples: int,
    epochs: int = 1,
    greedy: bool = False,
) -> Params:
    """One round on policy: lots of `prompts` of the round's problems are answered and learned from, one by one.

    The parameters that come back are those that are trained; `finish` makes a model of them.

    Args:
      ref: in the form for decoding.
      params: at the round's start.
      samples: rollouts of each prompt.
      epochs: over each lot.
    """
    problems, section = train_problems(session, number), session.config.policy
    lots = -(-len(problems) // prompts)
    bounds = np.linspace(0, len(problems), lots + 1).round().astype(int)  # parts of nearly one size
    parts = [problems[begin:end] for begin, end in itertools.pairwise(bounds)]
    largest = max(map(len, parts))
    groups = jax.process_count() // session.hosts_per_group
    rows = min(session.config.collect.batch_size, -(-largest // groups) * samples)  # of the largest share

    def draw(lot: int, params: Params) -> tuple[Sampled, dict[str, float]]:
        asked = dict(number=number, lot=lot, samples=samples, rows=rows, greedy=greedy)
        return sample(session, ref, params, parts[lot], **asked)

    batches = Lots(
        draw,
        worth,
        rollouts=largest * samples,
        rows=section.batch_size,
        epochs=epochs,
        bucket=session.config.fit.length_bucket,
        seed=session.seed(f"policy {number}"),
    )
    return fit(
        session,
        number,
        params,
        batches,
        loss,
        total_steps=lots * batches.steps,
        sample=batches.sample,
        sample_every=batches.steps,
    )


def fit(
    session: Session,
    number: int,
    params: Params,
    batches: Any,
    loss: Loss,
    *,
    total_steps: int,
    sample: Callable[[int, Params], dict] | None = None,
    sample_every: int = 1,
) -> Params:
    """`train.fit` of a policy's parameters in one round; arguments as there."""
    config, section = session.config.fit, session.config.policy
    optimizer, folder = train.make_optimizer(section.optimizer), session.workdir.guide_folder(number)
    with_value_head = VALUE_HEAD in params
    every = max(config.save_every // sample_every, 1) * sample_every
    with session.fitting():
        state = train.fit(
            train.init_state(params, optimizer),
            batches,
            loss_fn=functools.partial(_loss, by=scorer(session), loss=loss),
            optimizer=optimizer,
            schedule=train.make_schedule(section.optimizer, total_steps),
            accumulate=config.accumulate,
            checkpoints=Checkpoints(folder / "training" if with_value_head else folder),
            loop=train.Loop(
                name=f"round {number}: {session.config.algorithm}",
                total_steps=total_steps,
                log_every=config.log_every if sample is None else sample_every,
                save_every=every,
                log=session.workdir.append_metrics,
                sample=sample,
                sample_every=sample_every,
                flops=train.language_model_flops(models.ref_config(session)),
                profile=session.profile_folder(f"round_{number}"),
            ),
        )
    checkpoints = Checkpoints(folder)
    if with_value_head and not checkpoints.finished():  # what is kept is the policy, as every algorithm's
        checkpoints.save(state.replace(params=without_value_head(state.params), opt_state={}), final=True)
        checkpoints.wait()
    return state.params


def finish(session: Session, params: Params) -> LanguageModel:
    """The policy as it decodes."""
    return session.for_decoding(LanguageModel(without_value_head(params), models.ref_config(session)))


def _loss(
    params: Params, batch: PolicyBatch, whole: PolicyBatch | None = None, *, by: Scorer, loss: Loss
) -> tuple[jax.Array, dict]:
    return loss(*by(params, batch), batch, batch if whole is None else whole)
