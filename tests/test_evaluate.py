"""Majority, reranking and intervals against enumeration; then the whole evaluation, judged again from its own files."""

import json
import math
from collections import Counter

import helpers
import numpy as np
import pytest
from helpers import quick_compilation  # noqa: F401
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qsharp_jax import evaluate, rollouts, score
from qsharp_jax.dataset import Example
from qsharp_jax.errors import UserError

# --- Figures by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "rewards", "weights", "expected"),
    [
        (["4", "4", "7"], [0, 0, 1], None, 0),
        (["7", "4", "7"], [1, 0, 1], None, 1),
        (["4", "7"], [0, 1], None, 1 / 2),  # by lot
        (["4", "7", "9", "9", "4", "7"], [0, 1, 0, 0, 0, 1], None, 1 / 3),
        ([None, None, "7"], [0, 0, 1], None, 1),  # None is no vote
        ([None, None], [0, 0], None, 0),
        (["4", "4", "7"], [0, 0, 1], [0.2, 0.3, 0.6], 1),
        (["4", "4", "7"], [0, 0, 1], [0.1, 0.2, 0.3], 1 / 2),  # 0.1 + 0.2 is a tie with 0.3, not with floats
        ([None, "4", "7"], [0, 0, 1], [9.0, 0.2, 0.1], 0),
        (["4", "7"], [0, 1], [-2.0, -1.0], 1),  # values of a scalar guide may be negative
        (["4", "7"], [0, 1], [0.0, 0.0], 1 / 2),
    ],
)
def test_majority(answers, rewards, weights, expected):
    weights = np.ones(len(answers)) if weights is None else np.asarray(weights)
    assert evaluate.majority(answers, np.asarray(rewards, float), weights) == pytest.approx(expected)


@hypothesis_settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), st.integers(1, 9))
def test_majority_does_not_depend_on_order_or_unit(answers, unit):
    """And equals a count of votes; a tie is the mean over the lots."""
    reward_of = {"a": 1.0, "b": 0.0, "c": 0.5, None: 0.0}
    votes = Counter(answer for answer in answers if answer is not None)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    expected = np.mean([reward_of[answer] for answer in winners]) if winners else 0.0
    for order in (answers, answers[::-1], sorted(answers, key=str)):
        rewards = np.asarray([reward_of[answer] for answer in order])
        assert evaluate.majority(order, rewards, np.full(len(order), unit / 7)) == pytest.approx(expected)


def test_reranking_by_hand():
    """Two problems with three samples each, interleaved. Values are read at the last token."""
    table = [
        # problem, parsed, reward, values, tokens
        ("p", "4", 0.0, [0.9, 0.1], 2),
        ("q", "1", 1.0, [0.3], 1),
        ("p", "4", 0.0, [0.9, 0.2], 2),
        ("q", "2", 0.0, [0.1, 0.6], 2),
        ("p", "7", 1.0, [0.1, 0.2, 0.8], 3),
        ("q", "3", 0.0, [0.2], 1),
    ]
    scored = [
        {"problem_id": problem, "parsed": parsed, "reward": reward, "values": values, "seconds": 0.5}
        for problem, parsed, reward, values, _ in table
    ]
    samples = [{"tokens": [0] * tokens} for *_, tokens in table]
    rows = {row["method"]: row for row in evaluate.rerank_rows(2, samples, scored)}
    assert {method: row["reward"] for method, row in rows.items()} == {
        "pass_3": 1.0,  # both have a right sample
        "majority_3": pytest.approx((0 + 1 / 3) / 2),  # p: "4"; q: a lot of three
        "best_of_3": (1 + 0) / 2,  # p: 0.8 is the right one; q: 0.6 is a wrong one
        "weighted_majority_3": (1 + 0) / 2,  # p: "7" with 0.8 against 0.3; q: "2"
    }
    for row in rows.values():
        assert row["n"] == 2 and row["round"] == 2 and row["samples"] == 6 and row["seconds"] == pytest.approx(3)
        assert row["response_tokens"] == pytest.approx(11 / 6 * 3)  # an answer takes three responses
        assert row["eta"] is row["kl"] is row["kl_truncated"] is None


def make_sample(problem, eta, reward, kl=0.0, tokens=3):
    return dict(
        problem_id=problem, eta=eta, reward=reward, kl=kl, kl_truncated=2 * kl, tokens=[0] * tokens, finished=True,
        seconds=2.0,
    )  # fmt: skip


def test_policy_rows_are_one_an_eta():
    """The mean over problems of each problem's mean, and over samples of the rest."""
    samples = [
        make_sample("p", 0.5, 1.0, kl=1.0),
        make_sample("p", 0.1, 0.0, kl=3.0, tokens=5),
        make_sample("p", 0.5, 0.0, kl=2.0),
        make_sample("p", 0.1, 1.0, kl=5.0),
        make_sample("q", 0.5, 1.0, kl=6.0),
        make_sample("q", 0.1, 1.0, kl=1.0),
        make_sample("q", None, 0.0),
    ]
    rows = evaluate.policy_rows("qsharp", 2, samples)
    assert [row["eta"] for row in rows] == [0.5, 0.1, None]
    half, tenth, free = rows
    assert half["reward"] == 0.75 and tenth["reward"] == 0.75 and free["reward"] == 0
    assert (half["kl"], half["kl_truncated"], tenth["kl"]) == (3, 6, 3)
    assert (half["n"], half["samples"], free["n"]) == (2, 3, 1)
    assert half["response_tokens"] == 3 and tenth["response_tokens"] == pytest.approx(11 / 3)
    assert half["seconds"] == 6 and all(row["method"] == "qsharp" and row["round"] == 2 for row in rows)
    assert free["reward_low"] == free["reward_high"] == 0


# --- Intervals ------------------------------------------------------------------------------------------------------


def test_the_interval_is_the_bootstraps():
    """A sum of resampled 0s and 1s is binomial: the interval's ends are its 2.5% and 97.5% quantiles."""
    for n, right in ((20, 5), (50, 45), (40, 20)):
        p = right / n
        cumulative = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
        low, high = (np.searchsorted(cumulative, quantile) / n for quantile in (0.025, 0.975))
        found = evaluate.bootstrap(np.repeat([1.0, 0.0], [right, n - right]), resamples=20_000)
        np.testing.assert_allclose(found, (low, high), atol=1.01 / n)
    rewards = np.random.default_rng(0).random(400)
    error = 1.96 * rewards.std() / math.sqrt(400)
    expected = (rewards.mean() - error, rewards.mean() + error)
    np.testing.assert_allclose(evaluate.bootstrap(rewards), expected, atol=0.1 * error)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """300 evaluations of 60 problems: 95% of their intervals hold the true mean, less what is lost to discreteness."""
    rng = np.random.default_rng(1)
    intervals = [evaluate.bootstrap((rng.random(60) < 0.4).astype(float), resamples=400) for _ in range(300)]
    covered = np.mean([low <= 0.4 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.985


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.sampled_from([1 / 8, 0.1, 1 / 3]))
def test_the_interval_holds_the_mean_and_is_the_same_every_time(counts, unit):
    """Plots draw its two arms, which must not be negative."""
    rewards = np.asarray(counts) * unit
    low, high = evaluate.bootstrap(rewards, resamples=300)
    assert low <= float(np.mean(rewards)) <= high
    assert rewards.min() - 1e-12 <= low and high <= rewards.max() + 1e-12
    assert evaluate.bootstrap(rewards, resamples=300) == (low, high)


# --- The whole evaluation -------------------------------------------------------------------------------------------

ETAS = (0.5, 0.1)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A session, its models, and its rows: two random guides, of which the first is measured at collection's eta only."""
    session = helpers.session(tmp_path_factory.mktemp("evaluated"), "collect.eta=0.5")
    ref = helpers.reference()
    guides = {number: helpers.random_guide(ref.config, seed=number, scale=3.0) for number in (1, 2)}
    return session, ref, guides, evaluate.evaluate(session, ref, guides, full=True)


def samples_of(session, name):
    return evaluate.read_samples(session.workdir.samples / f"{name}.jsonl")


KEYS = {
    "method", "eta", "round", "n", "reward", "reward_low", "reward_high", "kl", "kl_truncated", "response_tokens",
    "samples", "seconds",
}  # fmt: skip


def test_an_evaluation_has_a_row_for_everything(evaluated):
    session, _, _, rows = evaluated
    assert json.loads(session.workdir.results.read_text()) == rows
    assert [(row["method"], row["round"], row["eta"]) for row in rows] == [
        ("pi_ref", 0, None),
        ("pi_ref_greedy", 0, None),
        ("qsharp", 1, 0.5),
        *(("qsharp", 2, eta) for eta in ETAS),
        *(("cd", 2, eta) for eta in ETAS),
        *((f"{name}_3", 2, None) for name in ("pass", "majority", "best_of", "weighted_majority")),
    ]
    for row in rows:
        assert KEYS <= set(row)
        assert row["n"] == 10 and row["reward_low"] <= row["reward"] <= row["reward_high"] and row["seconds"] > 0
    by_name = {row["method"]: row for row in rows}
    assert by_name["pi_ref"]["kl"] == by_name["pi_ref_greedy"]["kl"] == by_name["pi_ref"]["kl_truncated"] == 0
    assert by_name["pi_ref_greedy"]["kl_truncated"] > 0  # greedy is far from pi_ref, and no guide made it so
    assert all(row["kl"] > 0 for row in rows if row["method"] in ("qsharp", "cd"))
    assert by_name["pass_3"]["reward"] >= max(by_name[name]["reward"] for name in by_name if name.endswith("of_3"))


def test_every_row_can_be_computed_again_from_the_samples(evaluated):
    """Judged anew, problem by problem; all test problems, in their order, each as often as asked for."""
    session, _, _, rows = evaluated
    problems = {problem.problem_id: problem for problem in session.test_problems()}
    assert len(problems) == 10
    files = {"pi_ref": "pi_ref", "pi_ref_greedy": "pi_ref_greedy", "qsharp": "qsharp_round_{}", "cd": "cd_round_{}"}
    some = 0
    for row in rows:
        if row["method"] not in files:
            continue
        samples = samples_of(session, files[row["method"]].format(row["round"]))
        part = [sample for sample in samples if sample["eta"] == row["eta"]]
        count = 3 if row["method"] == "pi_ref" else 1
        assert [sample["problem_id"] for sample in part] == [name for name in problems for _ in range(count)]
        for sample in part:
            problem = problems[sample["problem_id"]]
            assert sample["prompt"] == problem.prompt and sample["answer"] == problem.answer
            assert sample["reward"] == float(sample["response"] == problem.answer)
            assert sample["response"] == session.text.decode(sample["tokens"])
        rewards = np.reshape([sample["reward"] for sample in part], (10, count))
        assert row["reward"] == pytest.approx(rewards.mean())
        assert row["kl"] == pytest.approx(np.mean([sample["kl"] for sample in part]))
        assert row["response_tokens"] == pytest.approx(np.mean([len(sample["tokens"]) for sample in part]))
        some += rewards.sum()
    assert some > 2  # else nothing was tested


def test_the_guide_judges_pi_refs_samples(evaluated):
    """The file of values is the last guide's, at the same samples; best of 3 is the sample that it likes best."""
    session, _, guides, rows = evaluated
    samples, scored = samples_of(session, "pi_ref"), samples_of(session, "pi_ref_values_round_2")
    examples = [Example(session.text.encode_prompt(sample["prompt"]), sample["tokens"]) for sample in samples]
    expected = score.score(guides[2], examples, rows=8, bucket=24)
    for sample, row, values in zip(samples, scored, expected, strict=True):
        np.testing.assert_allclose(row["values"], values, atol=6e-5)  # of four digits
        assert all(row[key] == sample[key] for key in ("problem_id", "reward", "parsed"))
    best, majority = [], []
    for begin in range(0, 30, 3):
        part = scored[begin : begin + 3]
        best.append(max(part, key=lambda row: row["values"][-1])["reward"])
        counts = Counter(row["parsed"] for row in part if row["parsed"] is not None)
        winners = [parsed for parsed, count in counts.items() if count == max(counts.values())]
        rewards = {row["parsed"]: row["reward"] for row in part}
        majority.append(np.mean([rewards[parsed] for parsed in winners]) if winners else 0)
    by_name = {row["method"]: row["reward"] for row in rows}
    assert by_name["best_of_3"] == pytest.approx(np.mean(best))
    assert by_name["majority_3"] == pytest.approx(np.mean(majority))


def forbid_sampling(monkeypatch):
    def sample(*arguments, **options):
        raise AssertionError("samples again")

    monkeypatch.setattr(rollouts, "sample", sample)
    monkeypatch.setattr(score, "score", sample)


def test_an_evaluation_is_not_done_twice(evaluated, monkeypatch):
    """Everything is read back from the samples, seconds included."""
    session, ref, guides, rows = evaluated
    forbid_sampling(monkeypatch)
    assert evaluate.evaluate(session, ref, guides, full=True) == rows


def test_a_stopped_evaluation_goes_on_with_the_method_it_was_at(evaluated, monkeypatch):
    """One file is missing: that method alone is sampled again, and gives the same responses."""
    session, ref, guides, rows = evaluated
    path = session.workdir.samples / "cd_round_2.jsonl"
    before, content = samples_of(session, "cd_round_2"), path.read_text()
    path.unlink()
    names, sample = [], rollouts.sample

    def noted(*arguments, name, **options):
        names.append(name)
        return sample(*arguments, **options)

    monkeypatch.setattr(rollouts, "sample", noted)
    again = evaluate.evaluate(session, ref, guides, full=True)
    assert names == ["evaluate cd, round 2"]
    assert [row["tokens"] for row in samples_of(session, "cd_round_2")] == [row["tokens"] for row in before]
    assert [row["reward"] for row in again] == [row["reward"] for row in rows]
    path.write_text(content)


def test_samples_at_other_etas_are_made_anew(evaluated, monkeypatch):
    """A file is that of its etas and counts: others are sampled, the same ones are read. inf is pi_ref, null in JSON."""
    session, ref, guides, _ = evaluated
    made = []
    for etas in ((0.2,), (0.2, 0.3), (math.inf, 0.2)):
        rows = evaluate.sample_method(session, "extra", ref, guides[2], number=2, etas=etas)
        assert [row["eta"] for row in rows] == [None if math.isinf(eta) else eta for eta in etas] * 10
        made.append(rows)
        with monkeypatch.context() as patch:
            forbid_sampling(patch)
            assert evaluate.sample_method(session, "extra", ref, guides[2], number=2, etas=etas) == rows
    free = [row for row in made[-1] if row["eta"] is None]
    assert not any(row["kl"] for row in free) and all(row["kl"] > 0 for row in made[0])
    with pytest.raises(AssertionError, match="samples again"):
        forbid_sampling(monkeypatch)
        evaluate.sample_method(session, "extra", ref, guides[2], number=2, etas=etas, samples=2)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    evaluate.write_samples(path, [{"a": 1}, {"a": "é\n"}, {"a": [1.5, None]}])
    assert evaluate.read_samples(path) == [{"a": 1}, {"a": "é\n"}, {"a": [1.5, None]}]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:4], lines[2]]) + "\n")
    with pytest.raises(UserError, match=f"{path}, line 2, is damaged"):
        evaluate.read_samples(path)


def test_a_line_separator_in_a_text_is_no_end_of_line(tmp_path):
    """Some of Unicode's line ends, and the control characters that `splitlines` takes for some, are plain text here."""
    rows = [{"response": f"one{separator}two"} for separator in "\n\r\v\f\x1c\x85\u2028\u2029"]
    evaluate.write_samples(tmp_path / "samples.jsonl", rows)
    assert evaluate.read_samples(tmp_path / "samples.jsonl") == rows


def test_a_guide_less_evaluation_is_pi_refs(tmp_path, monkeypatch, evaluated):
    """Before the first fit: two rows, and no others. (Its samples are lent by the evaluated session.)"""
    session = helpers.session(tmp_path, "collect.eta=0.5")
    for name in ("pi_ref", "pi_ref_greedy"):
        (session.workdir.samples / f"{name}.jsonl").write_bytes(
            (evaluated[0].workdir.samples / f"{name}.jsonl").read_bytes()
        )
    forbid_sampling(monkeypatch)
    rows = evaluate.evaluate(session, evaluated[1], {}, full=True)
    assert [row["method"] for row in rows] == ["pi_ref", "pi_ref_greedy"]
    assert rows == evaluated[3][:2]
