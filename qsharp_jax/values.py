"""Distributions of the reward-to-go: negative log-likelihood, mean, and log E exp(z/eta), the log-weight of a token.

Q*_eta(x, y) = eta log E_{z~Z*(x,y)}[exp(z/eta)] ("Q#", arXiv 2502.20548): one learned Z serves every eta. Methods are
elementwise over the batch dimensions, written `...`; M is the number of atoms. Rewards and eta have the same unit;
everything else is in nats.
"""

from typing import Any, Literal

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("bernoulli", "categorical", "scalar")
Projection = Literal["two_hot", "nearest"]


def _kind(name: str) -> Any:
    """A static field that distinguishes the distributions.

    In jax 0.10 two dataclasses have equal tree structures if their fields match in number and static values, whatever
    their classes, so `jit` could mistake one for the other.
    """
    return flax.struct.field(pytree_node=False, default=name, repr=False)


@flax.struct.dataclass
class Bernoulli:
    """Reward-to-go in {0, 1}, with P(z = 1) = sigmoid(logits) for float `logits` [...]."""

    logits: jax.Array
    kind: str = _kind("bernoulli")

    def mean(self) -> jax.Array:
        """E z, [...]."""
        chex.assert_type(self.logits, float)
        return jax.nn.sigmoid(self.logits)

    def log_mean(self) -> jax.Array:
        """log E z, [...]."""
        chex.assert_type(self.logits, float)
        return jax.nn.log_sigmoid(self.logits)

    def nll(self, reward_to_go: chex.Numeric) -> jax.Array:
        """Cross-entropy to the observed reward-to-go, [...].

        Args:
          reward_to_go: broadcastable to [...], in [0, 1]; a value between is the probability of a 1.

        Raises:
          ValueError: for a reward outside [0, 1]. Inside jit nothing is raised: call `check_rewards` before it.
        """
        chex.assert_type(self.logits, float)
        chex.assert_is_broadcastable(jnp.shape(reward_to_go), self.logits.shape)
        _check_range(reward_to_go, (0.0, 1.0))
        reward_to_go = jnp.asarray(reward_to_go, self.logits.dtype)
        # Not softplus(l) - r l: with both terms positive, a confident and correct guide keeps its digits.
        return reward_to_go * jax.nn.softplus(-self.logits) + (1 - reward_to_go) * jax.nn.softplus(self.logits)

    def log_mgf(self, eta: chex.Numeric) -> jax.Array:
        """log E exp(z/eta) = softplus(logits + 1/eta) - softplus(logits), [...], for eta in (0, inf]; inf gives 0.

        Logits of -inf and inf are allowed.
        """
        chex.assert_type(self.logits, float)
        return _bernoulli_log_mgf(self.logits, jnp.asarray(eta, self.logits.dtype))


@flax.struct.dataclass
class Categorical:
    """Reward-to-go on M fixed atoms, with P(z = atoms[m]) = softmax(logits)[m].

    Attributes:
      logits: [..., M] float; -inf is an atom of probability zero.
      atoms: [M] float, increasing.
    """

    logits: jax.Array
    atoms: jax.Array
    kind: str = _kind("categorical")

    def mean(self) -> jax.Array:
        """E z, [...]."""
        self._check_shapes()
        return jnp.sum(jax.nn.softmax(self.logits) * self.atoms, axis=-1)

    def log_mean(self) -> jax.Array:
        """log E z, [...], summed in the log domain, so that a mean too small for a float has a finite logarithm.

        Raises:
          ValueError: for a negative atom. (Traced atoms: nan.)
        """
        self._check_shapes()
        if _is_concrete(self.atoms) and np.any(np.asarray(self.atoms) < 0):
            raise ValueError(f"log_mean needs atoms >= 0, got {np.asarray(self.atoms)}: shift the rewards")
        return jax.nn.logsumexp(jax.nn.log_softmax(self.logits), b=self.atoms, axis=-1)

    def nll(self, reward_to_go: chex.Numeric, *, projection: Projection = "two_hot", clip: bool = False) -> jax.Array:
        """Cross-entropy to the observed reward-to-go projected on the atoms, [...]; arguments as in `project`."""
        self._check_shapes()
        chex.assert_is_broadcastable(jnp.shape(reward_to_go), self.logits.shape[:-1])
        target = project(reward_to_go, self.atoms, method=projection, clip=clip)  # [..., M]
        # An atom outside the target may have log-probability -inf, and 0 * inf is nan.
        log_probs = jnp.where(target > 0, jax.nn.log_softmax(self.logits), 0)
        return -jnp.sum(target * log_probs, axis=-1)

    def log_mgf(self, eta: chex.Numeric) -> jax.Array:
        """log E exp(z/eta) = logsumexp(log_softmax(logits) + atoms/eta), [...]; eta in (0, inf], inf gives 0."""
        self._check_shapes()
        dtype = self.logits.dtype
        return _categorical_log_mgf(self.logits, jnp.asarray(self.atoms, dtype), jnp.asarray(eta, dtype))

    def _check_shapes(self):
        chex.assert_type(self.logits, float)
        chex.assert_rank(self.atoms, 1)
        chex.assert_axis_dimension(self.logits, -1, self.atoms.shape[0])


@flax.struct.dataclass
class Scalar:
    """Reward-to-go known only by its mean `value` [...], a point mass: the MSE ablation, and values of CD and VAS."""

    value: jax.Array
    kind: str = _kind("scalar")

    def mean(self) -> jax.Array:
        """E z, [...]."""
        chex.assert_type(self.value, float)
        return self.value

    def log_mean(self) -> jax.Array:
        """log max(E z, 0), [...]: a regression below 0 gives its token weight 0."""
        chex.assert_type(self.value, float)
        return jnp.log(jnp.maximum(self.value, 0))

    def nll(self, reward_to_go: chex.Numeric) -> jax.Array:
        """(value - reward_to_go)^2 / 2, [...]: a unit-variance Gaussian's nll without its constant."""
        chex.assert_type(self.value, float)
        chex.assert_is_broadcastable(jnp.shape(reward_to_go), self.value.shape)
        return 0.5 * jnp.square(self.value - jnp.asarray(reward_to_go, self.value.dtype))

    def log_mgf(self, eta: chex.Numeric) -> jax.Array:
        """log E exp(z/eta) of a point mass: value / eta, [...], the tilt of CD, for eta in (0, inf]; inf gives 0."""
        chex.assert_type(self.value, float)
        return self.value / jnp.asarray(eta, self.value.dtype)


Distribution = Bernoulli | Categorical | Scalar


def from_outputs(kind: str, outputs: jax.Array, atoms: np.typing.ArrayLike | None = None) -> Distribution:
    """Return the float32 distribution that a value head's outputs parametrize.

    Args:
      kind: one of `KINDS`.
      outputs: [..., M] float for a categorical, else [..., 1].
      atoms: [M], increasing; for "categorical" only.

    Raises:
      ValueError: for an unknown kind, or a categorical without increasing atoms, one per output.
    """
    _check_kind(kind)
    chex.assert_type(outputs, float)
    outputs = outputs.astype(jnp.float32)
    if kind == "categorical":
        if atoms is None:
            raise ValueError("a categorical value needs atoms: the rewards-to-go that it distinguishes")
        _check_atoms(atoms)
        support = jnp.asarray(atoms, jnp.float32)
        if outputs.shape[-1:] != support.shape:
            raise ValueError(f"expected one output per atom: got outputs {outputs.shape} for atoms {support.shape}")
        return Categorical(outputs, support)
    chex.assert_axis_dimension(outputs, -1, 1)
    return Bernoulli(outputs[..., 0]) if kind == "bernoulli" else Scalar(outputs[..., 0])


def nll(
    distribution: Distribution, reward_to_go: chex.Numeric, *, projection: Projection = "two_hot", clip: bool = False
) -> jax.Array:
    """The distribution's `nll`; `projection` matters only for a `Categorical`, `clip` not for a `Scalar`."""
    if isinstance(distribution, Categorical):
        return distribution.nll(reward_to_go, projection=projection, clip=clip)
    if isinstance(distribution, Bernoulli) and clip:
        reward_to_go = jnp.clip(reward_to_go, 0, 1)
    return distribution.nll(reward_to_go)


def project(
    reward_to_go: chex.Numeric, atoms: np.typing.ArrayLike, *, method: Projection = "two_hot", clip: bool = False
) -> jax.Array:
    """The distribution on the atoms that represents an observed reward-to-go: [...] -> [..., M], summing to one.

    "two_hot" splits it between the two atoms around it so that the mean is the reward, for atoms of any spacing;
    "nearest" puts it on the closest atom, the lower one in a tie.

    Args:
      reward_to_go: [...].
      atoms: [M], increasing; two_hot needs M >= 2.
      clip: clip rewards to the range of the atoms, instead of raising an error. Inside jit nothing is raised, and
        rewards are always clipped: call `check_rewards` before it.

    Raises:
      ValueError: for an unknown method, atoms that do not increase, or a reward outside [atoms[0], atoms[-1]].
    """
    if method not in _PROJECTIONS:
        raise ValueError(f"unknown projection {method!r}: known are {', '.join(_PROJECTIONS)}")
    _check_atoms(atoms)
    if not clip:
        _check_range(reward_to_go, atoms)
    support = jnp.asarray(atoms, float)
    reward_to_go = jnp.clip(jnp.asarray(reward_to_go, support.dtype), support[0], support[-1])
    return _PROJECTIONS[method](reward_to_go, support)


def check_rewards(rewards: np.typing.ArrayLike, low: float, high: float) -> None:
    """Raise a ValueError unless every reward (not nan, any shape) lies in [low, high].

    For the host, before a batch enters jit. It compares in float32 as the loss does, so that a reward of 0.7 reaches an
    atom at 0.7.
    """
    rewards = np.atleast_1d(np.asarray(rewards, np.float32))
    outside = ~((np.float32(low) <= rewards) & (rewards <= np.float32(high)))
    if outside.any():
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"reward {rewards[where]:g} at index {where} is outside [{low:g}, {high:g}], as are {outside.sum()} of "
            f"{rewards.size} in all: rescale the rewards, use categorical atoms that cover them, or pass clip=True "
            "to a categorical"
        )


def _two_hot(reward_to_go: jax.Array, atoms: jax.Array) -> jax.Array:
    num_atoms = atoms.shape[0]
    if num_atoms < 2:
        raise ValueError('the projection "two_hot" needs two atoms or more; with one, use "nearest"')
    upper = jnp.clip(jnp.searchsorted(atoms, reward_to_go, side="right"), 1, num_atoms - 1)  # [...]
    share = (reward_to_go - atoms[upper - 1]) / (atoms[upper] - atoms[upper - 1])  # of the upper atom
    at_upper = jax.nn.one_hot(upper, num_atoms, dtype=atoms.dtype)  # [..., M]
    at_lower = jax.nn.one_hot(upper - 1, num_atoms, dtype=atoms.dtype)
    return at_lower + share[..., None] * (at_upper - at_lower)


def _nearest(reward_to_go: jax.Array, atoms: jax.Array) -> jax.Array:
    closest = jnp.argmin(jnp.abs(reward_to_go[..., None] - atoms), axis=-1)
    return jax.nn.one_hot(closest, atoms.shape[0], dtype=atoms.dtype)


_PROJECTIONS = {"two_hot": _two_hot, "nearest": _nearest}


@jax.custom_jvp
def _bernoulli_log_mgf(logits: jax.Array, eta: jax.Array) -> jax.Array:
    """log E exp(z/eta) to a relative 1e-5: the plain difference cancels where eta or |logits| is large.

    With l the logit and t = 1/eta,
      t <= 1: log1p(p expm1(t)), all of one sign;
      t > 1: [max(l + t, 0) - max(l, 0)] + log1p(exp(-|l + t|)) - log1p(exp(-|l|)), whose bracket is a clip of l + t.
    The derivative has a closed form below, so that the branch not taken cannot make it nan.
    """
    tilt = 1 / eta
    weak = jnp.log1p(jax.nn.sigmoid(logits) * jnp.expm1(jnp.minimum(tilt, 1)))
    shifted = logits + tilt
    strong = jnp.clip(shifted, 0, tilt) + jnp.log1p(jnp.exp(-jnp.abs(shifted))) - jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return jnp.where(tilt <= 1, weak, strong)


@_bernoulli_log_mgf.defjvp
def _bernoulli_log_mgf_jvp(primals, tangents):
    logits, eta = primals
    d_logits, d_eta = tangents
    tilted = jax.nn.sigmoid(logits + 1 / eta)  # P(z = 1) under the tilt
    # sigmoid(l + t) - sigmoid(l), without the cancellation.
    by_logits = tilted * jax.nn.sigmoid(-logits) * -jnp.expm1(-1 / eta)
    return _bernoulli_log_mgf(logits, eta), by_logits * d_logits - tilted / jnp.square(eta) * d_eta


@jax.custom_jvp
def _categorical_log_mgf(logits: jax.Array, atoms: jax.Array, eta: jax.Array) -> jax.Array:
    """log E exp(z/eta) to 1e-6, or to a relative 1e-5, however large the logits and 1/eta.

    If every |z| <= eta: log1p(E expm1(z/eta)), which keeps the digits of a small result. Otherwise: the difference of
    two logsumexp. There logits and z/eta of some hundreds may leave a sum near 0, and their rounding alone would be
    1e-5, so each is split into a whole number and a rest, and the whole numbers cancel exactly.
    The derivative has a closed form below, so that the branch not taken cannot make it nan.
    """
    eta = eta[..., None]
    weak = jnp.log1p(jnp.sum(jax.nn.softmax(logits) * jnp.expm1(jnp.clip(atoms / eta, -1, 1)), axis=-1))

    logits = jnp.maximum(logits, jnp.finfo(logits.dtype).min)  # -inf has no whole part
    whole = jnp.round(logits)
    rest = logits - whole
    whole = whole - jnp.max(whole, axis=-1, keepdims=True)
    rest_tilt = jnp.fmod(atoms, eta)  # exact, unlike division
    whole_tilt = jnp.round((atoms - rest_tilt) / eta)
    tilted = (whole + whole_tilt) + (rest + rest_tilt / eta)
    strong = jax.nn.logsumexp(tilted, axis=-1) - jax.nn.logsumexp(whole + rest, axis=-1)

    return jnp.where(jnp.all(jnp.abs(atoms) <= eta, axis=-1), weak, strong)


@_categorical_log_mgf.defjvp
def _categorical_log_mgf_jvp(primals, tangents):
    logits, atoms, eta = primals
    d_logits, d_atoms, d_eta = tangents
    probs = jax.nn.softmax(logits)
    tilted = jax.nn.softmax(logits + atoms / eta[..., None])
    tangent = jnp.sum((tilted - probs) * d_logits + tilted * d_atoms / eta[..., None], axis=-1)
    tangent -= jnp.sum(tilted * atoms, axis=-1) / jnp.square(eta) * d_eta
    return _categorical_log_mgf(logits, atoms, eta), tangent


def _check_kind(kind):
    if kind not in KINDS:
        raise ValueError(f"unknown kind of value {kind!r}: known are {', '.join(KINDS)}")


def _check_atoms(atoms):
    if not _is_concrete(atoms):
        chex.assert_rank(atoms, 1)
    elif np.ndim(atoms) != 1 or np.size(atoms) == 0 or np.any(np.diff(np.asarray(atoms, np.float32)) <= 0):
        raise ValueError(f"atoms must be a list of increasing numbers, got {np.asarray(atoms)}")


def _check_range(rewards, atoms):
    if _is_concrete(rewards) and _is_concrete(atoms):
        check_rewards(rewards, atoms[0], atoms[-1])


def _is_concrete(x):
    return not isinstance(x, jax.core.Tracer)
