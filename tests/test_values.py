"""Distributions of the reward-to-go against mpmath, and the limits that the paper's theory asks of them."""

import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsharp_jax import values

ATOMS = {
    "bernoulli": (0.0, 1.0), "unit": tuple(np.linspace(0, 1, 11)), "signed": (-1.0, -0.3, 0.2, 0.9),
    "symmetric": (-1.0, 1.0), "losses": (-5.0, -0.5), "scores": (0.3, 2.0, 10.0),
}  # fmt: skip

examples = settings(max_examples=60)
logit = st.floats(-80, 80, width=32)


@st.composite
def etas(draw):
    """eta in [1e-4, 1e3], evenly over the decades."""
    return float(np.float32(10 ** draw(st.floats(-3.99, 2.99))))


@st.composite
def categoricals(draw):
    """Logits, atoms and an eta, in half of the cases the eta at which two terms of the sum are equal.

    There the large logits and the large z/eta cancel, and a rounding of either shows.
    """
    atoms = draw(st.sampled_from(sorted(ATOMS.values())))
    logits = draw(st.lists(logit, min_size=len(atoms), max_size=len(atoms)))
    eta = draw(etas())
    if draw(st.booleans()):
        i, j = draw(st.integers(0, len(atoms) - 1)), draw(st.integers(0, len(atoms) - 1))
        gap, rise = logits[j] - logits[i], atoms[i] - atoms[j]
        tie = rise / gap if gap else 0
        eta = tie if 1e-4 < tie < 1e3 else eta
    return np.float32(logits), np.float32(atoms), np.float32(eta)


def exact_log_mgf(logits, atoms, eta):
    """log E exp(z/eta) of the float32 numbers themselves, to 60 digits."""
    with mpmath.workdps(60):
        weights = [mpmath.exp(mpmath.mpf(float(x))) for x in logits]
        tilts = [mpmath.exp(mpmath.mpf(float(z)) / mpmath.mpf(float(eta))) for z in atoms]
        return float(mpmath.log(mpmath.fdot(weights, tilts) / mpmath.fsum(weights)))


def assert_accurate(got, want):
    """To 1e-5 of itself or to 1e-6."""
    assert abs(got - want) <= max(1e-6, 1e-5 * abs(want)), f"got {got}, exact {want}"


# One program for all examples of a shape.
log_mgf = jax.jit(lambda distribution, eta: distribution.log_mgf(eta))
nll = jax.jit(lambda distribution, reward: distribution.nll(reward))
bernoulli_log_mgf = jax.jit(lambda logits, eta: values.Bernoulli(logits).log_mgf(eta))
categorical_log_mgf = jax.jit(lambda logits, atoms, eta: values.Categorical(logits, atoms).log_mgf(eta))
bernoulli_slopes = jax.jit(jax.grad(bernoulli_log_mgf, argnums=(0, 1)))
project = jax.jit(values.project)


@examples
@given(logit, etas())
def test_bernoulli_log_mgf_is_exact_in_float32(logit, eta):
    got = bernoulli_log_mgf(np.float32(logit), np.float32(eta))
    assert_accurate(float(got), exact_log_mgf([0, logit], [0, 1], eta))


@pytest.mark.parametrize("eta", [1e-4, 1e-2, 0.1, 0.99, 1.0, 1.01, 3.0, 1e2, 1e3])
def test_bernoulli_log_mgf_is_exact_around_its_kinks(eta):
    """Where logit + 1/eta or the logit changes sign, and where the formula changes, at eta = 1."""
    eta = np.float32(eta)
    logits = np.float32([x for x in (-1 / eta - 1, -1 / eta, -1 / eta + 1, -1e-3, 0, 1e-3, -80, 80) if abs(x) <= 80])
    for x, got in zip(logits, bernoulli_log_mgf(logits, eta), strict=True):
        assert_accurate(float(got), exact_log_mgf([0, x], [0, 1], eta))


def test_bernoulli_log_mgf_keeps_the_digits_of_a_rare_reward():
    """Ranking hopeless candidates needs relative accuracy: exp(-40) is below what 1 + x can hold."""
    for x, eta in [(-40.0, 0.1), (-40.0, 100.0), (-20.0, 2.0), (40.0, 1e3)]:
        np.testing.assert_allclose(
            values.Bernoulli(jnp.float32(x)).log_mgf(eta), exact_log_mgf([0, x], [0, 1], np.float32(eta)), rtol=1e-5
        )


@examples
@given(categoricals())
def test_categorical_log_mgf_is_exact_in_float32(case):
    logits, atoms, eta = case
    assert_accurate(float(categorical_log_mgf(logits, atoms, eta)), exact_log_mgf(logits, atoms, eta))


def test_categorical_log_mgf_cancels_exactly_where_the_sum_is_near_zero():
    """E exp(z/eta) near 1 from terms of e^160: adding rounded logits would be off by 1e-5."""
    logits, atoms = np.float32([79.3, -79.9]), np.float32([-1, 1])
    for t in 159.2 + np.linspace(-0.1, 0.1, 21):
        eta = np.float32(1 / t)
        assert_accurate(float(categorical_log_mgf(logits, atoms, eta)), exact_log_mgf(logits, atoms, eta))


def bernoulli_total(logits, eta):
    return values.Bernoulli(logits).log_mgf(eta).sum()


def categorical_total(logits, eta):
    logits = jnp.stack([logits, jnp.zeros_like(logits), jnp.full_like(logits, -jnp.inf)], axis=-1)
    return values.Categorical(logits, jnp.float32([-1, 0.5, 1])).log_mgf(eta).sum()


@pytest.mark.parametrize("total", [bernoulli_total, categorical_total])
def test_log_mgf_and_its_gradients_are_finite_everywhere(total):
    """Second derivatives too, since a loss through log_mgf may be differentiated twice."""

    def value_and_derivatives(logits, eta):
        slope = lambda x: jax.grad(total)(x, eta).sum()  # noqa: E731
        return total(logits, eta), jax.grad(total, argnums=(0, 1))(logits, eta), jax.grad(slope)(logits)

    derive = jax.jit(jax.vmap(value_and_derivatives, in_axes=(0, None)))
    logits = jnp.float32([-1e30, -1e4, -200, -80, -1, 0, 1, 80, 200, 1e4, 1e30])
    for eta in (1e-4, 1e-2, 1.0, 1e3, 1e30, np.inf):
        for x in jax.tree.leaves(derive(logits, jnp.float32(eta))):
            assert jnp.isfinite(x).all(), f"eta {eta}: {x}"


@examples
@given(st.floats(-20, 20, width=32), st.floats(0.0625, 50, width=32))
def test_bernoulli_log_mgf_gradients_are_those_of_the_definition(logit, eta):
    got = bernoulli_slopes(np.float32(logit), np.float32(eta))
    softplus = lambda x: mpmath.log1p(mpmath.exp(x))  # noqa: E731
    with mpmath.workdps(40):
        want = [
            float(mpmath.diff(lambda x, e: softplus(x + 1 / e) - softplus(x), (float(logit), float(eta)), order))
            for order in ((1, 0), (0, 1))
        ]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def test_categorical_log_mgf_gradients_are_those_of_the_definition():
    """Against the same formula in float64, differentiated numerically; atoms included, for whoever learns them."""
    rng = np.random.default_rng(0)

    def reference(logits, atoms, eta):
        return np.log(np.sum(np.exp(logits + atoms / eta)) / np.sum(np.exp(logits)))

    slopes = jax.jit(jax.grad(categorical_log_mgf, argnums=(0, 1, 2)))
    step = 1e-5
    for eta in (0.07, 0.5, 3.0, 40.0):
        point = (rng.normal(size=4) * 3, np.array([-0.5, 0.1, 0.6, 1.0]), np.array(eta))
        for argument, got in enumerate(slopes(*map(np.float32, point))):
            for index in np.ndindex(got.shape):
                above, below = [np.copy(x) for x in point], [np.copy(x) for x in point]
                above[argument][index] += step
                below[argument][index] -= step
                want = (reference(*above) - reference(*below)) / (2 * step)
                np.testing.assert_allclose(got[index], want, rtol=1e-3, atol=1e-6)


def distributions(rng, batch=5):
    atoms = np.float32([0.0, 0.2, 0.7, 1.5])
    return [
        values.Bernoulli(jnp.float32(rng.normal(size=batch))),
        values.Categorical(jnp.float32(rng.normal(size=(batch, 4))), jnp.asarray(atoms)),
        values.Scalar(jnp.float32(rng.normal(size=batch))),
    ]


def test_no_distribution_has_the_tree_structure_of_another():
    """Else `jit` may run the program of one for another, as it did with a Bernoulli's and a Scalar's single array."""
    structures = [jax.tree.structure(distribution) for distribution in distributions(np.random.default_rng(0))]
    for a, b in itertools.combinations(structures, 2):
        assert a != b


@pytest.mark.parametrize("index", range(3), ids=values.KINDS)
def test_weak_guidance_is_the_mean_and_none_is_zero(index):
    """log E exp(z/eta) -> E z / eta as eta grows (Q# becomes CD), and eta = inf is pi_ref itself."""
    distribution = distributions(np.random.default_rng(1))[index]
    np.testing.assert_allclose(log_mgf(distribution, 1e5) * 1e5, distribution.mean(), rtol=1e-4)
    np.testing.assert_array_equal(log_mgf(distribution, jnp.inf), 0)


def test_strong_guidance_is_the_best_possible_reward():
    """eta log E exp(z/eta) -> the essential supremum as eta -> 0; an atom of probability zero does not count."""
    bernoulli, categorical, scalar = distributions(np.random.default_rng(2))
    np.testing.assert_allclose(1e-4 * log_mgf(bernoulli, 1e-4), 1, atol=1e-3)
    np.testing.assert_allclose(1e-4 * log_mgf(categorical, 1e-4), 1.5, atol=1e-3)
    np.testing.assert_allclose(1e-4 * log_mgf(scalar, 1e-4), scalar.mean(), rtol=1e-5)
    impossible = categorical.replace(logits=categorical.logits.at[:, 3].set(-jnp.inf))
    np.testing.assert_allclose(1e-4 * log_mgf(impossible, 1e-4), 0.7, atol=1e-3)


def test_a_sure_reward_is_worth_reward_over_eta():
    certain = values.Bernoulli(jnp.float32([-np.inf, np.inf]))
    sure = values.Categorical(jnp.float32([-np.inf, 3, -np.inf]), jnp.float32([0, 0.3, 1]))
    for eta in (0.01, 0.5, 20.0):
        np.testing.assert_allclose(log_mgf(certain, eta), [0, 1 / eta], rtol=1e-6)
        np.testing.assert_allclose(log_mgf(sure, eta), 0.3 / eta, rtol=1e-6)


def test_bernoulli_is_categorical_on_zero_and_one():
    logits = jnp.linspace(-30, 30, 41)
    bernoulli = values.Bernoulli(logits)
    categorical = values.Categorical(jnp.stack([jnp.zeros_like(logits), logits], axis=-1), jnp.float32([0, 1]))
    np.testing.assert_allclose(bernoulli.mean(), categorical.mean(), rtol=1e-5)
    np.testing.assert_allclose(bernoulli.log_mean(), categorical.log_mean(), rtol=1e-5, atol=1e-6)
    for eta in (1e-3, 0.1, 0.9, 5.0, 1e3):
        np.testing.assert_allclose(log_mgf(bernoulli, eta), log_mgf(categorical, eta), rtol=2e-5, atol=2e-6)
    for reward in (0.0, 0.25, 1.0):
        np.testing.assert_allclose(nll(bernoulli, reward), nll(categorical, reward), rtol=1e-5, atol=1e-6)


def test_eta_broadcasts_against_the_batch():
    """One Z, many eta: a column of eta [E, 1] against a batch [B] is a sweep [E, B]."""
    etas = jnp.float32([0.1, 1.0, 10.0])[:, None]
    for distribution in distributions(np.random.default_rng(3)):
        sweep = log_mgf(distribution, etas)
        assert sweep.shape == (3, 5)
        for row, eta in zip(sweep, etas[:, 0], strict=True):
            np.testing.assert_allclose(row, log_mgf(distribution, eta), rtol=1e-6)


@pytest.mark.parametrize("index", range(3), ids=values.KINDS)
def test_log_mean_is_the_logarithm_of_the_mean(index):
    distribution = distributions(np.random.default_rng(4))[index]
    with np.errstate(divide="ignore"):
        want = np.log(np.maximum(distribution.mean(), 0))
    np.testing.assert_allclose(distribution.log_mean(), want, rtol=1e-5, atol=1e-6)


def test_log_mean_of_a_tiny_mean_is_finite():
    """exp(-200) is no float32, its logarithm is."""
    np.testing.assert_allclose(values.Bernoulli(jnp.float32(-200)).log_mean(), -200)
    categorical = values.Categorical(jnp.float32([0, -200]), jnp.float32([0, 2]))
    np.testing.assert_allclose(categorical.log_mean(), -200 + np.log(2), rtol=1e-6)


def test_nll_of_an_outcome_is_minus_its_log_probability():
    logits = np.float32([-80, -3, 0, 2, 80])
    bernoulli = values.Bernoulli(jnp.asarray(logits))
    np.testing.assert_allclose(nll(bernoulli, 1.0), np.logaddexp(0, -np.float64(logits)), rtol=1e-6)
    np.testing.assert_allclose(nll(bernoulli, 0.0), np.logaddexp(0, np.float64(logits)), rtol=1e-6)
    atoms = jnp.float32([-1, 0.5, 2])
    categorical = values.Categorical(jnp.float32(np.random.default_rng(0).normal(size=(3, 3))), atoms)
    np.testing.assert_allclose(nll(categorical, atoms), -jnp.diag(jax.nn.log_softmax(categorical.logits)), rtol=1e-6)
    # A scalar's is half the squared error.
    np.testing.assert_allclose(values.Scalar(jnp.float32([0.2, -3])).nll(jnp.float32([1, 2])), [0.32, 12.5])


@pytest.mark.parametrize("projection", ["two_hot", "nearest"])
def test_nll_is_least_at_the_law_of_the_data(projection):
    """Maximum likelihood recovers the frequencies: at them the gradient of the mean nll vanishes."""
    atoms = np.float32([0, 0.1, 0.4, 1])
    rewards = np.random.default_rng(0).choice(atoms, size=200, p=[0.1, 0.2, 0.3, 0.4])
    frequencies = np.mean(rewards[:, None] == atoms, axis=0)

    @jax.grad
    def slope(logits):
        categorical = values.Categorical(jnp.tile(logits, (200, 1)), atoms)
        return categorical.nll(rewards, projection=projection).mean()

    np.testing.assert_allclose(jax.jit(slope)(np.log(np.float32(frequencies))), 0, atol=1e-6)
    wins = np.float32([0, 1, 1, 0, 1, 1, 1, 0.5])
    slope = jax.grad(lambda logit: values.Bernoulli(jnp.full(8, logit)).nll(wins).mean())
    np.testing.assert_allclose(slope(np.log(5.5 / 2.5)), 0, atol=1e-6)


def test_nll_gradients_are_finite_for_confident_and_excluded_outcomes():
    logits = jnp.float32([-1e4, -80, 0, 80, 1e4])
    slope = jax.jit(jax.grad(lambda x, reward: values.Bernoulli(x).nll(reward).sum()))
    for reward in (0.0, 0.3, 1.0):
        assert jnp.isfinite(slope(logits, reward)).all()
    loss = jax.jit(jax.value_and_grad(lambda x: values.Categorical(x, jnp.float32([0, 0.5, 1])).nll(0.25)))
    for x in loss(jnp.float32([0, 1, -jnp.inf])):
        assert jnp.isfinite(x).all()


@examples
@given(
    st.sampled_from([2, 6]).flatmap(
        lambda m: st.lists(st.integers(-1000, 1000), min_size=m, max_size=m, unique=True).map(sorted)
    ),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_two_hot_preserves_the_mean(atoms, shares):
    """On atoms of any spacing, with the weight on the two around the reward."""
    atoms = np.float32(atoms) / 100
    rewards = np.float32(atoms[0] + np.array(shares) * (atoms[-1] - atoms[0])).clip(atoms[0], atoms[-1])
    target = np.float64(project(rewards, atoms))
    np.testing.assert_allclose(target @ atoms, rewards, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(target.sum(axis=-1), 1, atol=1e-6)
    assert (target >= 0).all()
    for row, reward in zip(target, rewards, strict=True):
        support = np.flatnonzero(row)
        assert np.ptp(support) <= 1
        assert atoms[support[0]] - 1e-5 <= reward <= atoms[support[-1]] + 1e-5


def test_a_reward_on_an_atom_is_that_atom_and_the_nearest_of_two_is_the_lower():
    atoms = jnp.float32([-2, 0, 0.1, 7])
    for method in ("two_hot", "nearest"):
        np.testing.assert_array_equal(values.project(atoms, atoms, method=method), np.eye(4))
    got = values.project(jnp.float32([0.1, 0.5, 0.51, 2.4]), jnp.float32([0, 1, 3]), method="nearest")
    np.testing.assert_array_equal(got.argmax(axis=-1), [0, 0, 1, 2])


BAD_ATOMS = ([0.0, 0.0, 1.0], [1.0, 0.0], [[0.0, 1.0]], [])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        *((lambda atoms=a: values.project(0.0, np.float32(atoms)), "increasing") for a in BAD_ATOMS),
        *((lambda atoms=a: values.from_outputs("categorical", jnp.zeros((1, 2)), np.float32(atoms)), "increasing") for a in BAD_ATOMS),
        (lambda: values.project(0.0, jnp.float32([0, 1]), method="three_hot"), "known are two_hot, nearest"),
        (lambda: values.project(1.0, jnp.float32([1])), "two atoms or more"),
        (lambda: values.check_rewards([0.0, np.nan], 0, 1), "reward nan"),
        (lambda: values.Categorical(jnp.zeros(2), jnp.float32([-1, 1])).log_mean(), "atoms >= 0"),
        (lambda: values.from_outputs("gaussian", jnp.zeros((1, 1))), "'gaussian': known are bernoulli, categorical, sc"),
        (lambda: values.from_outputs("categorical", jnp.zeros((1, 2))), "needs atoms"),
        (lambda: values.from_outputs("categorical", jnp.zeros((1, 2)), (0.0, 1.0, 2.0)), r"\(1, 2\) for atoms \(3,\)"),
    ],
)  # fmt: skip
def test_mistakes_are_errors_that_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_reward_out_of_range_is_an_error_that_says_which_or_in_jit_the_end():
    categorical = values.Categorical(jnp.zeros((3, 2)), jnp.float32([0, 1]))
    rewards = np.array([0.5, 1.5, -2])
    message = r"reward 1\.5 at index \(1,\) is outside \[0, 1\], as are 2 of 3 in all: .*clip=True"
    for distribution in (categorical, values.Bernoulli(jnp.zeros(3))):
        with pytest.raises(ValueError, match=message):
            distribution.nll(rewards)
    with pytest.raises(ValueError, match=message):
        values.check_rewards(rewards, 0, 1)
    np.testing.assert_allclose(categorical.nll(rewards, clip=True), np.log(2), rtol=1e-6)
    values.Scalar(jnp.zeros(3)).nll(rewards)  # a mean has no range
    # Inside jit nothing can be raised; the target stays a distribution.
    target = jax.jit(values.project)(jnp.float32([-5, 5]), jnp.float32([0, 0.5, 1]))
    np.testing.assert_array_equal(target, [[1, 0, 0], [0, 0, 1]])


def test_rewards_are_compared_in_float32():
    """float32(0.7) < 0.7: a reward at the last atom is in range all the same."""
    atoms = jnp.linspace(0.1, 0.7, 7)
    values.check_rewards(np.float64(0.7), atoms[0], atoms[-1])
    np.testing.assert_allclose(values.project(0.7, atoms)[-1], 1, atol=1e-5)


def test_from_outputs_reads_a_head():
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.bfloat16)
    atoms = (0.0, 0.5, 1.0, 2.0)
    categorical = values.from_outputs("categorical", outputs, atoms)
    assert categorical.mean().shape == (2, 3) and categorical.mean().dtype == jnp.float32
    for kind in ("bernoulli", "scalar"):
        distribution = values.from_outputs(kind, outputs[..., :1])
        assert distribution.mean().shape == (2, 3) and distribution.mean().dtype == jnp.float32


@pytest.mark.parametrize("index", range(3), ids=values.KINDS)
def test_distributions_pass_through_jit_vmap_and_grad(index):
    distribution = distributions(np.random.default_rng(5))[index]
    rewards = jnp.float32([0, 1, 0.5, 0.2, 1])
    per_example = jax.vmap(nll, in_axes=(_batch_axes(distribution), 0))(distribution, rewards)
    np.testing.assert_allclose(per_example, nll(distribution, rewards), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda d: d.nll(rewards).mean()))(distribution)
    assert jax.tree.structure(gradient) == jax.tree.structure(distribution)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))


def _batch_axes(distribution):
    if isinstance(distribution, values.Categorical):
        return distribution.replace(logits=0, atoms=None)
    return jax.tree.map(lambda _: 0, distribution)
