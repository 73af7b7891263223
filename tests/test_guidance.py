"""Guidance against brute force in numpy, and against the exact optimal policies of token trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
from devices import traced_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from marks import slow

from qsharp_jax import guidance, values

examples = settings(max_examples=40)
seeds = st.integers(0, 2**32 - 1)
B, V, K = 4, 9, 3


def on(platform, function):
    """The function, compiled here in its form for a platform."""
    compiled = jax.jit(lambda *arguments: function(*arguments))

    def call(*arguments):
        with traced_for(platform):
            return compiled(*arguments)

    return call


# One shape and one program for all examples.
tilt = jax.jit(guidance.tilt)
truncate = jax.jit(guidance.truncate)
truncate_on_cuda = on("cuda", guidance.truncate)
top_by_groups = jax.jit(guidance.top_k_by_groups, static_argnames="k")
kl = jax.jit(guidance.kl)
sample = jax.jit(guidance.sample)


def random_logits(rng, shape=(B, V), ties=False, excluded=0.0):
    """Float32 logits; with `ties` of a few values only, both zeros among them; some share of them -inf."""
    logits = rng.choice([-2.5, -1.0, -0.0, 0.0, 1.5], size=shape) if ties else rng.normal(size=shape) * 3
    logits = np.where(rng.random(shape) < excluded, -np.inf, logits)
    logits[..., rng.integers(shape[-1])] = 1.0  # a row has some token
    return np.float32(logits)


def softmax(logits):
    weights = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_candidates_are_the_most_likely_tokens_ties_by_lower_id():
    logits = random_logits(np.random.default_rng(0), ties=True) + 0.0
    got = guidance.top_candidates(jnp.asarray(logits), K)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.argsort(-logits, axis=-1, kind="stable")[:, :K])


@pytest.mark.parametrize("k", [0, V + 1])
def test_candidates_must_fit_the_vocabulary(k):
    with pytest.raises(ValueError, match=f"{k} candidates of a vocabulary of {V}"):
        guidance.top_candidates(jnp.zeros((B, V)), k)


@examples
@given(seeds, st.booleans(), st.sampled_from([0, 0.9, 0.999, 1]))
def test_candidates_by_groups_are_those_of_the_whole(seed, ties, excluded):
    """Also where equal logits lie in more groups than are taken, and where fewer tokens than candidates are finite."""
    logits = random_logits(np.random.default_rng(seed), (2, 1000), ties=ties, excluded=excluded)
    logits += 0.0  # one zero: a sort of floats has two
    np.testing.assert_array_equal(top_by_groups(logits, k=5), jax.lax.top_k(logits, 5)[1])


@examples
@given(seeds)
def test_tilt_adds_the_weights_at_the_candidates_and_nothing_elsewhere(seed):
    rng = np.random.default_rng(seed)
    logits, weights = random_logits(rng, excluded=0.2), np.float32(rng.normal(size=(B, K)) * 100)
    candidates = np.stack([rng.permutation(V)[:K] for _ in range(B)])
    want = logits.copy()
    for b in range(B):
        for k in range(K):
            want[b, candidates[b, k]] += weights[b, k]
    np.testing.assert_array_equal(tilt(logits, candidates, weights), want)


log_weights = jax.jit(guidance.log_weights, static_argnames="mode")


@pytest.mark.parametrize("kind", values.KINDS)
@pytest.mark.parametrize("mode", guidance.MODES)
def test_a_row_with_infinite_eta_is_pi_ref(kind, mode):
    outputs = np.float32(np.random.default_rng(0).normal(size=(B, K, 5 if kind == "categorical" else 1)))
    distribution = values.from_outputs(kind, jnp.asarray(outputs), np.linspace(0, 1, 5))
    weights = np.asarray(log_weights(distribution, np.float32([0.1, np.inf, 1e-4, np.inf]), mode=mode))
    assert weights.shape == (B, K)
    np.testing.assert_array_equal(weights[1::2], 0)
    assert (weights[::2] != 0).all()


def test_modes_are_their_formulas():
    p, eta = np.array([[0.1, 0.5, 0.9]]), 0.2
    distribution = values.Bernoulli(jnp.float32(np.log(p / (1 - p))))
    weights = functools.partial(log_weights, distribution, np.float32([eta]))
    np.testing.assert_allclose(weights(mode="qsharp"), np.log(1 - p + p * np.exp(1 / eta)), rtol=1e-5)
    np.testing.assert_allclose(weights(mode="cd"), p / eta, rtol=1e-5)
    np.testing.assert_allclose(weights(mode="expectation"), np.log(p), rtol=1e-5)
    with pytest.raises(ValueError, match="unknown guidance mode 'vas': known are qsharp, cd, expectation"):
        weights(mode="vas")


@pytest.mark.parametrize("mode", guidance.MODES)
def test_a_token_that_is_no_candidate_weighs_as_a_sure_reward_of_zero(mode):
    nothing = values.Categorical(jnp.float32([[[0, -np.inf]]] * 3), jnp.float32([0, 1]))  # all mass on the atom 0
    eta = np.float32([0.1, 5, np.inf])
    np.testing.assert_array_equal(guidance.zero_log_weight(eta, mode), guidance.log_weights(nothing, eta, mode)[:, 0])


def test_in_expectation_mode_only_candidates_are_left():
    eta = np.float32([0.1, np.inf])
    tilted = tilt(
        np.zeros((2, 3), np.float32), np.array([[1], [1]]), np.float32([[-2], [0]]),
        guidance.zero_log_weight(eta, "expectation"),
    )  # fmt: skip
    np.testing.assert_array_equal(tilted, [[-np.inf, -2, -np.inf], [0, 0, 0]])


mass = jax.jit(guidance.mass_log_weight)


@examples
@given(seeds, st.sampled_from([0.01, 1.0, 1000.0]), st.sampled_from([0.0, 0.3, 1.0, 2.0]))
def test_the_scored_tokens_keep_their_mass_under_pi_ref(seed, scale, temperature):
    """At every temperature, however large the weights: by softmax in float64, with some candidates left out."""
    rng = np.random.default_rng(seed)
    ref, weights = random_logits(rng), np.float32(rng.normal(size=(B, K)) * scale)
    candidates, scored = np.asarray(guidance.top_candidates(jnp.asarray(ref), K)), rng.random((B, K)) < 0.8
    others = np.asarray(mass(np.take_along_axis(ref, candidates, 1), weights, jnp.full(B, temperature), scored))
    weights = np.where(scored, weights, others[:, None])
    tilted = np.float64(ref) + np.float64(others)[:, None]
    np.put_along_axis(tilted, candidates, np.take_along_axis(np.float64(ref), candidates, 1) + weights, axis=1)
    for row in range(B):
        kept = candidates[row, scored[row]]
        before, after = (softmax(logits[row] / (temperature or 1))[kept].sum() for logits in (np.float64(ref), tilted))
        np.testing.assert_allclose(after, before, rtol=2e-4 * max(scale, 1), atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.3, -7.7, 1e6, 1e-30])
def test_equal_weights_have_that_mass_weight_exactly(constant):
    ref, weights = random_logits(np.random.default_rng(3), (B, K)), jnp.full((B, K), constant)
    for temperature in (0.0, 0.7, 1.0):
        np.testing.assert_array_equal(mass(ref, weights, jnp.full(B, temperature)), weights[:, 0])


def test_mass_of_one_sure_candidate_and_of_none():
    """A candidate of weight 1e-12 that has all the tilt, weights of -inf beside others, and no scored candidate."""
    ref = np.float32(np.log([[1, 1e-12], [1, 1], [1, 1]]))
    weights = np.float32([[-100, 20], [-np.inf, 2], [5, 3]])
    scored = np.array([[True, True], [True, True], [False, False]])
    want = [np.log(1e-12) + 20, np.log(0.5) + 2, 0]
    np.testing.assert_allclose(mass(ref, weights, np.ones(3, np.float32), scored), want, rtol=1e-6)


def test_relative_weights_leave_the_policy_and_an_infinite_one_as_it_is():
    weights, others = np.float32([[1, 3], [-2, 4], [0, 5]]), np.float32([2, -2, -np.inf])
    got_weights, got_others = guidance.relative(weights, others)
    np.testing.assert_array_equal(got_weights, [[-1, 1], [0, 6], [0, 5]])
    np.testing.assert_array_equal(got_others, [0, 0, -np.inf])


def prefix_weights(tree, eta):
    """log E exp(z / eta) of the exact law after each inner node's own prefix: [nodes]."""
    laws = jnp.float32(np.log(np.maximum(tabular.total_laws(tree)[tree.inner], 1e-38)))
    law = values.Categorical(laws, jnp.float32(tabular.totals(tree)[0]))
    return law.log_mgf(eta)


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_with_an_exact_guide_both_lose_no_more_than_the_unscored_tokens_allow(seed, k):
    """On random trees. With every token a candidate all definitions are pi*; with fewer, the policy's KL from pi* at a
    node is at most that of not knowing the unscored tokens' weights: the spread of their true log-weights."""
    tree = tabular.random_tree(np.random.default_rng(seed), 5, 3, final_rewards=(0.0, 0.5, 1.0), step_rewards=(0.0,))
    exact, ref, eta = exact_values(tree), ref_logits(tree), 0.3
    _, _, optimal = tabular.soft_bellman(tree, eta)
    optimal = optimal[tree.inner]
    candidates = guidance.top_candidates(ref, k)
    laws = exact.replace(logits=jax.vmap(lambda logits, row: logits[row])(exact.logits, candidates))
    weights = guidance.log_weights(laws, jnp.full(len(ref), eta), "qsharp")
    every = np.asarray(guidance.log_weights(exact, jnp.full(len(ref), eta), "qsharp"))
    others = {
        "mass": mass(jnp.take_along_axis(ref, candidates, 1), weights, jnp.ones(len(ref))),
        "prefix": prefix_weights(tree, eta),
    }
    for name, rest in others.items():
        logits = guidance.tilt(ref, candidates, *guidance.relative(weights, rest))
        policy = softmax(logits)
        lost = np.sum(optimal * (np.log(optimal) - np.log(policy)), axis=1)
        unscored = np.ones_like(every, bool)
        np.put_along_axis(unscored, np.asarray(candidates), False, axis=1)
        error = np.where(unscored, np.abs(every - np.asarray(rest)[:, None]), 0).max(1)
        assert (lost <= error + 1e-5).all(), name
        if k == 5:
            np.testing.assert_allclose(policy, optimal, atol=1e-5)


def exact_values(tree):
    """The exact law of a sequence's reward after every inner node and token, as a Categorical: [nodes, V, M]."""
    laws = tabular.total_laws(tree)[tree.children(tree.inner)]
    with np.errstate(divide="ignore"):
        return values.Categorical(jnp.float32(np.log(laws)), jnp.float32(tabular.totals(tree)[0]))


def ref_logits(tree):
    return jnp.float32(np.log(tree.pi_ref[tree.inner]))


@functools.partial(jax.jit, static_argnames="mode")
def guide(ref_logits, distribution, eta, mode="qsharp"):
    """Tilted logits at every inner node, with the whole vocabulary as candidates: [nodes, V]."""
    candidates = guidance.top_candidates(ref_logits, ref_logits.shape[-1])
    of_candidates = jax.vmap(lambda logits, row: logits[row])(distribution.logits, candidates)
    eta = jnp.full(ref_logits.shape[0], eta)
    weights = guidance.log_weights(distribution.replace(logits=of_candidates), eta, mode)
    return guidance.tilt(ref_logits, candidates, weights)


def as_policy(tree, logits):
    policy = np.zeros_like(tree.pi_ref)
    policy[tree.inner] = softmax(logits)
    return policy


@pytest.mark.parametrize("seed", range(4))
def test_tilting_by_the_exact_law_gives_the_optimal_policy(seed):
    """pi*_eta, its KL and its reward on random trees; the law is the same for every eta."""
    tree = tabular.random_tree(
        np.random.default_rng(seed), 2 + seed % 4, 4, final_rewards=(-0.5, 0.0, 1.0), step_rewards=(0.0, 0.25)
    )
    distribution = exact_values(tree)
    for eta in (0.1, 0.5, 5.0):
        _, _, optimal = tabular.soft_bellman(tree, eta)
        logits = guide(ref_logits(tree), distribution, eta)
        policy = as_policy(tree, logits)
        np.testing.assert_allclose(policy, optimal, atol=1e-5)
        np.testing.assert_allclose(tabular.evaluate(tree, policy), tabular.evaluate(tree, optimal), atol=1e-5)
        # The KL of a token is what a sequence adds up: at each node, against the oracle's own sum.
        pi, pi_ref = optimal[tree.inner], tree.pi_ref[tree.inner]
        np.testing.assert_allclose(kl(logits, ref_logits(tree)), np.sum(pi * np.log(pi / pi_ref), axis=1), atol=1e-5)


def test_a_bernoulli_guide_is_optimal_where_the_reward_is_zero_or_one():
    """Down to branches that are sure to win or to lose, whose logit is infinite."""
    tree = tabular.random_tree(np.random.default_rng(7), vocab=3, depth=5)
    law = exact_values(tree)
    distribution = values.Bernoulli(law.logits[..., 1] - law.logits[..., 0])
    assert jnp.isinf(distribution.logits).any()
    for eta in (0.05, 0.3, 2.0):
        _, _, optimal = tabular.soft_bellman(tree, eta)
        np.testing.assert_allclose(as_policy(tree, guide(ref_logits(tree), distribution, eta)), optimal, atol=1e-5)


def test_as_eta_falls_cd_goes_left_and_qsharp_goes_right():
    """The toy tree of Theorems 4.1 and 4.2: CD earns 0.1 however small eta is, Q# earns 1."""
    tree = tabular.toy_tree()
    distribution = exact_values(tree)
    earned = {}
    for mode in ("cd", "qsharp"):
        policy = as_policy(tree, guide(ref_logits(tree), distribution, 1e-3, mode))
        earned[mode] = tabular.evaluate(tree, policy)[0][0]
        np.testing.assert_allclose(policy[0], [1, 0] if mode == "cd" else [0, 1], atol=1e-6)
    np.testing.assert_allclose([earned["cd"], earned["qsharp"]], [0.1, 1.0], atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0, 2.0, 1e-6])
def test_temperature_divides_the_distance_to_the_largest_logit_and_zero_is_one(temperature):
    logits = random_logits(np.random.default_rng(0), excluded=0.2)
    got = guidance.temper(jnp.asarray(logits), jnp.full(B, temperature))
    want = (np.float64(logits) - logits.max(-1, keepdims=True)) / (temperature or 1)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(np.max(got, axis=-1), 0)


def test_at_temperature_one_log_probabilities_are_the_logits_bit_for_bit():
    logits = random_logits(np.random.default_rng(0), excluded=0.2)
    tempered = guidance.temper(jnp.asarray(logits), jnp.ones(B))
    np.testing.assert_array_equal(jax.nn.log_softmax(tempered), jax.nn.log_softmax(jnp.asarray(logits)))


def nucleus(logits, greedy, top_k, top_p):
    """The kept tokens of one row, found the slow way; None where rounding may decide."""
    order = sorted(range(V), key=lambda token: (-logits[token], token))
    if greedy:
        return set(order[:1])
    if top_k:
        order = order[:top_k]
    if top_p == 1:
        return set(order)
    probabilities = softmax(logits[order])
    kept, mass = set(), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if kept and abs(mass - top_p) < 1e-5:
            return None
        if kept and mass >= top_p:
            break
        kept.add(token)
        mass += probability
    return kept


@examples
@given(seeds, st.booleans())
def test_truncation_keeps_the_top_k_and_the_nucleus(seed, ties):
    """Each row by its own temperature, top_k and top_p; of equal tokens the lower ids."""
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, ties=ties, excluded=0.1)
    temperature = np.float32(rng.choice([0, 0.7, 1], size=B))
    top_k = rng.choice([0, 1, 3, V, 100], size=B).astype(np.int32)
    top_p = np.float32(rng.choice([0, 0.05, 0.5, 0.9, 0.99, 1], size=B))
    got = np.asarray(truncate(logits, temperature, top_k, top_p))
    np.testing.assert_array_equal(truncate_on_cuda(logits, temperature, top_k, top_p), got)
    checked = 0
    for b in range(B):
        kept = nucleus(logits[b], temperature[b] == 0, top_k[b], top_p[b])
        if kept is not None:
            want = np.where(np.isin(np.arange(V), list(kept)), logits[b], -np.inf)
            np.testing.assert_array_equal(got[b], want)
            checked += 1
    assume(checked)


def test_truncation_that_is_off_changes_nothing():
    """top_p = 1 keeps tokens whose probability is lost in the rounding of the sum."""
    logits = np.float32([[50, -50, 0, -np.inf, 1e-30], [0, 0, 0, 0, 0]])
    got = truncate(logits, jnp.ones(2), jnp.zeros(2, jnp.int32), jnp.ones(2))
    np.testing.assert_array_equal(got, logits)


def test_equal_tokens_are_kept_from_the_lowest_id():
    """A uniform row under top_p 0.5 and under top_k 3, and a greedy one: half, three and one, from id 0."""
    logits = jnp.zeros((3, 8)).at[:, ::2].set(-0.0)
    got = truncate(logits, jnp.float32([1, 1, 0]), jnp.int32([0, 3, 0]), jnp.float32([0.5, 1, 1]))
    np.testing.assert_array_equal((got > -jnp.inf).sum(axis=-1), [4, 3, 1])
    np.testing.assert_array_equal(got[:, 0] > -jnp.inf, True)
    assert (jnp.diff((got > -jnp.inf).astype(int), axis=-1) <= 0).all()


def test_a_large_vocabulary_is_cut_where_a_sort_would_cut_it():
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=(2, 50_000)) * 2)
    logits[1] = np.round(logits[1], 1)  # as bfloat16 logits are: many are equal
    got = truncate(logits, jnp.ones(2), jnp.int32([0, 1000]), jnp.float32([0.9, 0.8]))
    for b, top_k in enumerate((50_000, 1000)):
        order = np.argsort(-logits[b], kind="stable")[:top_k]
        mass = np.cumsum(softmax(logits[b][order]))
        size = np.searchsorted(mass, [0.9, 0.8][b]) + 1
        kept = np.flatnonzero(np.asarray(got[b]) > -np.inf)
        assert abs(len(kept) - size) <= 1  # rounding of a sum of 50,000 terms
        np.testing.assert_array_equal(np.sort(order[: len(kept)]), kept)


def test_no_loop_of_a_truncation_waits_for_a_condition_on_cuda():
    arguments = jnp.zeros((2, 300)), jnp.ones(2), jnp.zeros(2, jnp.int32), jnp.ones(2)
    lowered = {
        platform: truncate.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    assert ["stablehlo.while" in text for text in lowered.values()] == [True, False]


@examples
@given(seeds)
def test_kl_is_the_exact_sum(seed):
    """In float64, with tokens that the policy excludes, that the reference excludes, and that both do."""
    rng = np.random.default_rng(seed)
    logits, ref = random_logits(rng, excluded=0.3), random_logits(rng, excluded=rng.choice([0.0, 0.1]))
    p, q = softmax(logits), softmax(ref)
    want = np.zeros(B)
    for b, v in np.ndindex(B, V):
        if logits[b, v] > -np.inf:
            want[b] += p[b, v] * (np.log(p[b, v]) - np.log(q[b, v])) if ref[b, v] > -np.inf else np.inf
    np.testing.assert_allclose(kl(logits, ref), want, rtol=1e-5, atol=2e-6)


def test_kl_after_truncation_is_minus_the_log_of_the_kept_mass():
    """Nucleus sampling of pi_ref alone has a KL: at most -log(top_p), which is no one's guidance."""
    ref = random_logits(np.random.default_rng(1))
    truncated = truncate(ref, jnp.ones(B), jnp.zeros(B, jnp.int32), jnp.full(B, 0.8))
    kept = np.sum(softmax(ref), axis=-1, where=np.asarray(truncated) > -np.inf)
    np.testing.assert_allclose(kl(truncated, ref), -np.log(kept), atol=1e-6)
    np.testing.assert_array_equal(kl(ref, ref), 0)


def test_kl_with_excluded_tokens_is_infinite_or_has_finite_gradients():
    assert kl(np.float32([[0, -500]]), np.float32([[0, -np.inf]]))[0] == np.inf  # though the probability underflows
    logits, ref = jnp.float32([[0, 1, -np.inf, -np.inf]]), jnp.float32([[0.5, 0, 1, -np.inf]])
    by_logits, by_ref = jax.grad(lambda *args: kl(*args).sum(), argnums=(0, 1))(logits, ref)
    p, q = softmax(logits), softmax(ref)
    log_ratio = np.zeros_like(p)
    log_ratio[p > 0] = np.log(p[p > 0] / q[p > 0])
    np.testing.assert_allclose(by_ref, q - p, atol=1e-6)
    np.testing.assert_allclose(by_logits, p * (log_ratio - np.sum(p * log_ratio)), atol=1e-6)


def test_log_prob_is_the_log_probability():
    logits = random_logits(np.random.default_rng(0))
    tokens = np.int32([0, 3, 8, 3])
    want = np.log(softmax(logits))[range(B), tokens]
    np.testing.assert_allclose(guidance.log_prob(jnp.asarray(logits), tokens), want, rtol=1e-5)
    assert guidance.log_prob(jnp.float32([[0, -np.inf]]), jnp.int32([1]))[0] == -np.inf


def test_samples_have_the_policy_s_frequencies():
    """A chi-square over 20,000 rows, and never a token of logit -inf."""
    logits = np.float32([0.5, -1, 2, -np.inf, 0, -3])
    n, p = 20_000, softmax(logits)
    tokens = sample(jnp.tile(logits, (n, 1)), jax.random.split(jax.random.key(0), n))
    counts = np.bincount(tokens, minlength=6)
    assert counts[3] == 0
    drawn = p > 0
    statistic = np.sum((counts - n * p)[drawn] ** 2 / (n * p)[drawn])
    assert statistic < 18.5  # the 0.999 quantile with 4 degrees of freedom
