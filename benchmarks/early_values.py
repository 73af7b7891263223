"""The time at which a guide knows: what a token's tilt makes use of, and what the guide learns of it too late.

    python benchmarks/early_values.py --workdir runs/sentiment [--rollouts 416] [--top-k-candidates 20]

On the held-out rollouts of pi_ref, the guide's weight w = E exp(z / eta) goes from the prompt's to the response's in
steps. Each is the product of two: what the token gains, w of the token over its mean over the candidates, which guided
decoding makes use of; and what comes late, that mean over w of the token before, by which the guide only sees, from the
candidates, where pi_ref was going. Reward and KL of both ways to tilt are pi_ref's responses weighted:

- whole responses, by w of the end over w of the prompt, which best of n sees too, and no decoding does;
- tokens, by the product of the gains. The KL is summed over the steps, each exact over the candidates.

The reference is pi_ref as it was sampled, temperature and top-p included. "late" is the variance of the logarithm of
what comes late, as a share of it and of the gains'; both over responses. A line at the same KL, by interpolation over
the etas, compares guides.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import decoding, guidance, report, values
from qsharp_jax.data.records import Rollouts, read_rounds, split_held_out, with_reward
from qsharp_jax.decoding import api, step
from qsharp_jax.decoding.state import Settings, State
from qsharp_jax.evaluation import forecast
from qsharp_jax.models import value
from qsharp_jax.models.decoder import LanguageModel
from qsharp_jax.models.value import ValueModel
from qsharp_jax.run import models
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import Sampling

ETAS = (2.0, 1.0, 0.7, 0.5, 0.3, 0.2, 0.14, 0.1, 0.07, 0.05)
KLS = (0.2, 0.3, 0.5, 0.64)  # nats; best of 4 has 0.64 at most
ROWS = 64


class Steps(NamedTuple):
    """Every step of N responses of T tokens, at L etas. The candidates are K tokens that pi_ref may draw."""

    log_probs: np.ndarray  # [N, T, K] under the truncated pi_ref; -inf for those it cuts off
    log_weights: np.ndarray  # [N, T, K, L] of the candidates
    before: np.ndarray  # [N, T, L] of the token before
    place: np.ndarray  # [N, T] of the token among the candidates, -1 where it is none


@functools.partial(jax.jit, static_argnames="settings")
def along(
    ref: LanguageModel, guide: ValueModel, state: State, tokens: jax.Array, sampling: dict, settings: Settings
) -> Steps:
    """The steps of given responses, tokens [N, T], from the state after their prompts."""

    def one(state: State, token: jax.Array) -> tuple[State, Steps]:
        ref_logits, ref_cache = step.next_logits(ref, state.ref_cache, state, settings)
        candidates = guidance.top_candidates(ref_logits, settings.candidates)
        hidden, guide_cache = step.advance(
            guide.params["trunk"], guide.config.trunk, state.guide_cache, state.pending, state.previous, candidates
        )
        outputs = value.outputs(guide.params, guide.config, hidden)
        distribution = values.from_outputs(guide.config.distribution, outputs, guide.config.atoms)
        weights = jnp.stack(
            [guidance.log_weights(distribution, jnp.full(token.shape, eta), "qsharp") for eta in ETAS], axis=-1
        )
        weights /= sampling["temperature"][0]  # which divides the tilt too
        policy = guidance.truncate(guidance.temper(ref_logits, sampling["temperature"]), **sampling)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(policy), candidates, axis=1)
        match = candidates == token[:, None]
        place = jnp.where(match.any(1), match.argmax(1), -1)
        state = state.replace(
            ref_cache=ref_cache, guide_cache=guide_cache, pending=token, previous=state.pending, step=state.step + 1
        )
        return state, Steps(log_probs, weights[:, 1:], weights[:, 0], place)

    steps = jax.lax.scan(one, state, tokens.T)[1]
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), steps)


def read(session: Session, rollouts: Rollouts, sampling: Sampling) -> Steps:
    """The steps of all rollouts, `ROWS` at a time."""
    ref = decoding.for_decoding(models.load_ref(session))
    guide = decoding.for_decoding(models.load_guide(session))
    parts = []
    for begin in range(0, len(rollouts), ROWS):
        part = [rollouts[index] for index in range(begin, min(begin + ROWS, len(rollouts)))]
        filled = part + part[-1:] * (ROWS - len(part))
        run = api.Run(ref, guide, [list(rollout.prompt_tokens) for rollout in filled], sampling, rng=0)
        tokens = np.zeros((ROWS, sampling.max_new_tokens), np.int32)
        for row, rollout in enumerate(filled):
            tokens[row, : len(rollout.response_tokens)] = rollout.response_tokens
        controls = {name: getattr(run.controls, name) for name in ("temperature", "top_p")}
        steps = along(run.ref, run.guide, run.state, jnp.asarray(tokens), controls | {"top_k": None}, run.settings)
        parts.append(Steps(*(np.asarray(leaf)[: len(part)].astype(float) for leaf in steps)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def gains(steps: Steps, eta: int) -> tuple[np.ndarray, np.ndarray]:
    """Log of what each token gains, and each step's KL, [N, T]; a token that is no candidate has gained nothing."""
    kept = steps.log_probs > -np.inf
    log_weights = np.where(kept, steps.log_weights[..., eta], -np.inf)
    mass = np.logaddexp.reduce(steps.log_probs, axis=-1)
    log_mean = np.logaddexp.reduce(steps.log_probs + log_weights, axis=-1) - mass
    with np.errstate(invalid="ignore"):
        gain = np.where(kept, log_weights - log_mean[..., None], 0)
        kl = np.where(kept, np.exp(steps.log_probs + gain) * gain, 0).sum(-1)
    of_token = np.take_along_axis(gain, np.maximum(steps.place, 0).astype(int)[..., None], axis=-1)[..., 0]
    return np.where(steps.place < 0, 0, of_token), kl


def line(steps: Steps, lengths: np.ndarray, rewards: np.ndarray, eta: int) -> dict[str, float]:
    """Reward and KL of both ways to tilt, and the share that comes late."""
    within = np.arange(steps.place.shape[1]) < lengths[:, None]
    gain, kl = (np.where(within, x, 0) for x in gains(steps, eta))
    total = gain.sum(1)
    weights = np.exp(total - total.max())
    weights /= weights.sum()
    rows, last = np.arange(len(rewards)), lengths - 1
    place = steps.place[rows, last].astype(int)
    whole = steps.log_weights[rows, last, place, eta] - steps.before[:, 0, eta]
    late = (whole - total).var()
    return {
        "eta": ETAS[eta],
        **{f"whole_{name}": number for name, number in forecast.tilted(whole, rewards).items()},
        "reward": float(weights @ rewards),
        "kl": float(weights @ kl.sum(1)),
        "effective": float(1 / (weights**2).sum()),
        "late": float(late / (late + total.var())),
    }


def at_kl(rows: Sequence[dict], kl: float, prefix: str = "") -> str:
    points = sorted((row[f"{prefix}kl"], row[f"{prefix}reward"]) for row in rows)
    kls, rewards = zip(*points, strict=True)
    return f"{np.interp(kl, kls, rewards):.3f}" if kls[0] <= kl <= kls[-1] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--rollouts", type=int, default=416, help="held-out rollouts, at most")
    parser.add_argument("--top-k-candidates", type=int, default=20)
    options = parser.parse_args()
    session = Session(Workdir.attach(options.workdir))
    data = with_reward(read_rounds(session.workdir.path / "rollouts", [1], texts=False))
    _, rollouts = split_held_out(data, session.config.fit.holdout)
    rollouts = rollouts.select(np.arange(min(options.rollouts, len(rollouts))))
    if session.config.value.type != "v" or not len(rollouts):
        parser.error("the run needs a guide of type v, and held-out rollouts (fit.holdout)")
    # Any finite eta: the guide runs. Every row has its own candidates.
    sampling = dataclasses.replace(
        models.sampling(session), eta=1.0, top_k_candidates=options.top_k_candidates, candidate_slots=None
    )
    steps = read(session, rollouts, sampling)
    lengths, rewards = rollouts.columns["response_tokens"].lengths, rollouts.rewards.astype(float)
    scored = steps.place[np.arange(len(lengths)), lengths - 1] >= 0  # only where the end's value is known
    steps, lengths, rewards = jax.tree.map(lambda leaf: leaf[scored], (steps, lengths, rewards))
    rows = [line(steps, lengths, rewards, eta) for eta in range(len(ETAS))]
    print(f"{len(rewards)} held-out rollouts, mean reward {rewards.mean():.3f}\n")
    columns = [["eta", "whole responses", "KL", "tokens", "KL", "effective rollouts", "late"]]
    columns += [
        [
            f"{row['eta']:g}", f"{row['whole_reward']:.3f}", f"{row['whole_kl']:.2f}", f"{row['reward']:.3f}",
            f"{row['kl']:.2f}", f"{row['effective']:.0f}", f"{row['late']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    print(report.markdown(columns))
    compared = [["at a KL of", *(f"{kl:g}" for kl in KLS)]]
    compared.append(["whole responses", *(at_kl(rows, kl, "whole_") for kl in KLS)])
    compared.append(["tokens", *(at_kl(rows, kl) for kl in KLS)])
    print(f"\n{report.markdown(compared)}")


if __name__ == "__main__":
    main()
