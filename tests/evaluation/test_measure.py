"""The figures of samples by hand; then the whole evaluation, computed again and judged again from its own files."""

import json
import math
import shutil
from collections import Counter

import helpers
import numpy as np
import pytest

from qsharp_jax.data.batches import Example
from qsharp_jax.decoding import ContinuousBatch
from qsharp_jax.evaluation import measure, score, statistics
from qsharp_jax.run import models, problems
from qsharp_jax.run.problems import judge
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import registry
from qsharp_jax.tasks.judging import Judge


def test_reranking_by_hand():
    """Two problems with three samples each, interleaved. Values are read at the last token."""
    table = [
        # problem, parsed, reward, values, tokens
        ("p", "4", 0.0, [0.9, 0.1], 2), ("q", "1", 1.0, [0.3], 1), ("p", "4", 0.0, [0.9, 0.2], 2),
        ("q", "2", 0.0, [0.1, 0.6], 2), ("p", "7", 1.0, [0.1, 0.2, 0.8], 3), ("q", "3", 0.0, [0.2], 1),
    ]  # fmt: skip
    samples = [
        {"problem_id": problem, "reward": reward, "tokens": [0] * tokens} for problem, _, reward, _, tokens in table
    ]
    scored = [{"values": values, "seconds": 0.5} for *_, values, _ in table]
    answers = {name: [parsed for problem, parsed, *_ in table if problem == name] for name in "pq"}
    rows = {row["method"]: row for row in measure.rerank_rows(2, samples, answers, scored)}
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


def test_reranking_where_a_response_has_no_reward_takes_as_many_of_each_problem():
    table = [("p", 0.0, 0.1), ("q", 1.0, 0.3), ("p", 0.0, 0.2), ("q", 0.0, 0.6), ("p", 1.0, 0.8)]
    samples = [{"problem_id": problem, "reward": reward, "tokens": [0]} for problem, reward, _ in table]
    scored = [{"values": [value], "seconds": 0.5} for *_, value in table]
    answers = {"p": ["4", "4", "7"], "q": ["1", "2"]}
    rows = {row["method"]: row["reward"] for row in measure.rerank_rows(2, samples, answers, scored)}
    best, weighted = 0.0, 0.0  # p's third response would be the best one
    assert rows == {"pass_2": 0.5, "majority_2": 0.25, "best_of_2": best, "weighted_majority_2": weighted}


def test_a_method_none_of_whose_responses_has_a_reward_is_refused():
    samples = {("cd", 1): [make_sample("p", None), make_sample("q", None)]}
    with pytest.raises(UserError, match="no response of cd to the test problems has a reward; fix"):
        measure.to_rows(None, samples, 1, None, passes=(), majorities=set())


def make_sample(problem, reward, parsed="4", kl=0.0, tokens=3, finished=True):
    return dict(
        problem_id=problem, reward=reward, parsed=parsed, kl=kl, kl_truncated=2 * kl, tokens=[0] * tokens,
        finished=finished,
    )  # fmt: skip


def test_the_figures_of_a_method_by_hand():
    samples = [
        make_sample("q", 1.0, "1", kl=1.0),
        make_sample("p", 0.0, "4", kl=3.0, tokens=5),
        make_sample("q", 0.0, None, kl=2.0, finished=False),
        make_sample("p", 1.0, "7", kl=5.0),
        make_sample("q", 1.0, "01", kl=6.0),
        make_sample("p", 0.0, "4.0", kl=1.0, tokens=7),
    ]
    answers = {"p": ["4", "7", "4"], "q": ["1", None, "1"]}
    made = measure.measure(samples, answers, (), {2, 3, 4})
    assert made == {
        "reward": {"q": pytest.approx(2 / 3), "p": pytest.approx(1 / 3)},
        "kl": {"q": 3.0, "p": 3.0},
        "kl_truncated": {"q": 6.0, "p": 6.0},
        "response_tokens": {"q": 3.0, "p": 5.0},
        "finished": {"q": pytest.approx(2 / 3), "p": 1.0},
        "no_answer": {"q": pytest.approx(1 / 3), "p": 0.0},
        "pass_1": {"q": pytest.approx(2 / 3), "p": pytest.approx(1 / 3)},
        "pass_2": {"q": pytest.approx(1), "p": pytest.approx(2 / 3)},
        "pass_3": {"q": pytest.approx(1), "p": pytest.approx(1)},
        "majority_2": {"q": 1.0, "p": 0.5},
        "majority_3": {"q": 1.0, "p": 0.0},  # with "4.0" apart p would be a draw of three
    }
    assert list(made["kl"]) == ["q", "p"]
    asked = measure.measure(samples, answers, (2.0, 8.0), ())  # as a config has them
    assert [name for name in asked if name.startswith("pass")] == ["pass_2"]
    assert not any(name.startswith("pass") for name in measure.measure(samples, answers, (8.0,), ()))


def test_answers_that_are_the_same_mathematics_vote_together():
    """Two ways to write a half outvote a third, which each of them would only draw with."""
    judge = Judge(registry.get("math"), workers=1)
    samples = [
        make_sample("p", reward, parsed) | {"prompt": "", "answer": "1/2"}
        for parsed, reward in (("0.5", 1.0), ("1/3", 0.0), (r"\frac12", 1.0), (r"\frac{1}{3}", 0.0), ("1/2", 1.0))
    ]
    try:
        answers = measure._classes(judge, samples)
    finally:
        judge.close()
    assert answers == {"p": ["1/2", "1/3", "1/2", "1/3", "1/2"]}
    assert measure.measure(samples, answers, (), {5})["majority_5"] == {"p": 1.0}


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_by_default_k_doubles_up_to_all_samples(most, sizes):
    samples = [make_sample("p", 1.0) for _ in range(most)]
    made = measure.measure(samples, {"p": ["4"] * most}, (), {1, 2})
    assert [int(name[5:]) for name in made if name.startswith("pass_")] == sizes
    assert [name for name in made if name.startswith("majority_")] == ["majority_2"] * (most > 1)


ETAS, SETTINGS = (0.5, 0.1), ("collect.eta=0.5", "evaluate.guided_samples=2", "evaluate.power=3.0")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A session, its models, and its rows: two random guides, of which the first is measured at collection's eta only."""
    session = helpers.session(tmp_path_factory.mktemp("evaluated"), *SETTINGS)
    ref = helpers.reference()
    guides = {number: helpers.random_guide(ref.config, seed=number, scale=3.0) for number in (1, 2)}
    return session, ref, guides, measure.evaluate(session, ref, guides, full=True)


def samples_of(session, name):
    return measure.read_samples(session.workdir.samples / f"{name}.jsonl")


KEYS = {
    "method", "eta", "round", "n", "reward", "reward_low", "reward_high", "kl", "kl_truncated", "response_tokens",
    "samples", "seconds",
}  # fmt: skip
LEARNED = ("qsharp", "qsharp_greedy", "cd", "qsharp_power")
MEASURED = ("reward", "kl", "kl_truncated", "response_tokens", "finished", "no_answer")


def test_an_evaluation_has_a_row_for_everything(evaluated):
    session, _, _, rows = evaluated
    assert json.loads(session.workdir.results.read_text()) == rows
    assert [(row["method"], row["round"], row["eta"]) for row in rows] == [
        *((name, 0, None) for name in ("pi_ref", "pi_ref_greedy", "pi_ref_top_k")),
        ("qsharp", 1, 0.5),
        *(("qsharp", 2, eta) for eta in ETAS),
        ("qsharp_greedy", 2, 0.5),
        *(("cd", 2, eta) for eta in ETAS),
        *(("qsharp_power", 2, eta) for eta in ETAS),
        *((f"{name}_3", 2, None) for name in ("pass", "majority", "best_of", "weighted_majority")),
    ]
    for row in rows:
        assert KEYS <= set(row)
        assert row["n"] == 10 and row["reward_low"] <= row["reward"] <= row["reward_high"] and row["seconds"] > 0
    by_name = {row["method"]: row for row in rows}
    assert by_name["pi_ref"]["kl"] == by_name["pi_ref_greedy"]["kl"] == by_name["pi_ref"]["kl_truncated"] == 0
    assert by_name["pi_ref_greedy"]["kl_truncated"] > 0  # greedy is far from pi_ref, and no guide made it so
    assert all(row["kl"] > 0 for row in rows if row["method"] in ("qsharp", "cd"))
    assert by_name["pi_ref_top_k"]["kl"] == 0 < by_name["pi_ref_top_k"]["kl_truncated"]
    assert by_name["qsharp_greedy"]["kl_truncated"] > by_name["qsharp_greedy"]["kl"] > 0
    for eta in ETAS:  # further from pi_ref than the tilt itself
        kl = {row["method"]: row["kl"] for row in rows if row["round"] == 2 and row["eta"] == eta}
        assert kl["qsharp_power"] > kl["qsharp"]
    assert by_name["qsharp_power"]["power"] == 3
    for row in rows[:9]:
        assert all(row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] for name in MEASURED)
        assert row["pass_1"] == pytest.approx(row["reward"]) and 0 <= row["no_answer"] < 1
    assert by_name["pi_ref"]["pass_1"] <= by_name["pi_ref"]["pass_2"] <= by_name["pi_ref"]["pass_3"]
    assert "majority_2" in by_name["pi_ref"] and "majority_2_minus_pi_ref" in by_name["cd"]
    for name in ("pass_3", "majority_3"):
        assert by_name[name]["reward"] == pytest.approx(by_name["pi_ref"][name])
    assert by_name["pass_3"]["reward"] >= max(by_name[name]["reward"] for name in by_name if name.endswith("of_3"))


def test_every_row_can_be_computed_again_from_the_samples(evaluated):
    """Judged anew, problem by problem; all test problems, in their order, each as often as asked for."""
    session, _, _, rows = evaluated
    by_id = {problem.problem_id: problem for problem in problems.test_problems(session)}
    assert len(by_id) == 10
    files = {"pi_ref": "pi_ref", "pi_ref_greedy": "pi_ref_greedy", "pi_ref_top_k": "pi_ref_top_k"}
    files |= {name: f"{name}_round_{{}}" for name in LEARNED}
    some = 0
    for row in rows:
        if row["method"] not in files:
            continue
        samples = samples_of(session, files[row["method"]].format(row["round"]))
        part = [sample for sample in samples if sample["eta"] == row["eta"]]
        count = {"pi_ref": 3, "pi_ref_greedy": 1, "qsharp_greedy": 1}.get(row["method"], 2)
        assert [sample["problem_id"] for sample in part] == [name for name in by_id for _ in range(count)]
        for sample in part:
            problem = by_id[sample["problem_id"]]
            assert sample["prompt"] == problem.prompt and sample["answer"] == problem.answer
            assert sample["reward"] == float(sample["response"] == problem.answer)
            assert sample["response"] == models.tokenizer(session).decode(sample["tokens"])
        rewards = np.reshape([sample["reward"] for sample in part], (10, count))
        assert row["reward"] == pytest.approx(rewards.mean())
        assert row["kl"] == pytest.approx(np.mean([sample["kl"] for sample in part]))
        assert row["response_tokens"] == pytest.approx(np.mean([len(sample["tokens"]) for sample in part]))
        assert row["no_answer"] == pytest.approx(np.mean([sample["parsed"] is None for sample in part]))
        if count > 1:
            assert row[f"pass_{count}"] == pytest.approx(rewards.max(axis=1).mean())
        some += rewards.sum()
    assert some > 2  # else nothing was tested


def test_differences_are_paired(evaluated):
    """Differences of each problem's means, computed from the samples; Q#'s to CD's at the same eta, and nothing to itself."""
    session, _, _, rows = evaluated

    def means(name, eta, key):
        part = [sample for sample in samples_of(session, name) if sample["eta"] == eta]
        return np.asarray(statistics.by_problem(part, key))

    for row in rows:
        own = f"{row['method']}_round_{row['round']}"
        assert ("reward_minus_pi_ref" in row) == (row["method"] in LEARNED)
        assert ("reward_minus_cd" in row) == ((row["method"], row["round"]) == ("qsharp", 2))
        for other, key in (("pi_ref", "reward"), ("cd", "reward"), ("cd", "kl")):
            if (name := f"{key}_minus_{other}") in row:
                theirs = means("pi_ref", None, key) if other == "pi_ref" else means("cd_round_2", row["eta"], key)
                each = means(own, row["eta"], key) - theirs
                assert row[name] == pytest.approx(each.mean())
                assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(statistics.bootstrap(each))


def values_of(session, guide, samples):
    """The guide's values by teacher forcing."""
    encode = models.tokenizer(session).encode_prompt
    examples = [Example(encode(sample["prompt"]), sample["tokens"]) for sample in samples]
    return score.score(guide, examples, rows=8, bucket=24)


def test_guided_samples_have_a_value_for_each_token(evaluated):
    """The guide's, as it gives them by teacher forcing; pi_ref's samples have none of their own."""
    session, _, guides, _ = evaluated
    samples = samples_of(session, "qsharp_round_2")
    for sample, values in zip(samples, values_of(session, guides[2], samples), strict=True):
        assert len(sample["values"]) == len(sample["tokens"])
        known = [place for place, value in enumerate(sample["values"]) if value is not None]
        assert known, "4 candidates of 12 tokens are most of what is drawn"
        np.testing.assert_allclose([sample["values"][place] for place in known], values[known], atol=2e-4)
    assert not any("values" in sample for sample in samples_of(session, "pi_ref"))


def test_the_guide_judges_pi_refs_samples(evaluated):
    """The file of values is the last guide's, at the same samples; best of 3 is the sample that it likes best."""
    session, _, guides, rows = evaluated
    samples, scored = samples_of(session, "pi_ref"), samples_of(session, "pi_ref_values_round_2")
    expected = values_of(session, guides[2], samples)
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

    monkeypatch.setattr("qsharp_jax.evaluation.samples.ContinuousBatch", sample)
    monkeypatch.setattr(score, "score", sample)


def test_an_evaluation_is_not_done_twice(evaluated, monkeypatch):
    session, ref, guides, rows = evaluated
    forbid_sampling(monkeypatch)
    assert measure.evaluate(session, ref, guides, full=True) == rows


def test_a_stopped_evaluation_goes_on_with_the_method_it_was_at(evaluated, monkeypatch):
    session, ref, guides, rows = evaluated
    path = session.workdir.samples / "cd_round_2.jsonl"
    before, content = samples_of(session, "cd_round_2"), path.read_text()
    path.unlink()
    modes, batch = [], ContinuousBatch

    def noted(ref, guide, prompts, sampling, **options):
        modes.append(sampling.mode)
        return batch(ref, guide, prompts, sampling, **options)

    monkeypatch.setattr("qsharp_jax.evaluation.samples.ContinuousBatch", noted)
    again = measure.evaluate(session, ref, guides, full=True)
    assert modes == ["cd"]
    assert [row["tokens"] for row in samples_of(session, "cd_round_2")] == [row["tokens"] for row in before]
    assert [row["reward"] for row in again] == [row["reward"] for row in rows]
    path.write_text(content)


@pytest.mark.parametrize(("own", "shared"), [(0.5, 0.5), (0.3, 0.1)])
def test_rounds_are_measured_at_an_eta_of_the_last_one(tmp_path, monkeypatch, own, shared):
    """At the run's own eta, or at the smallest that the last round is measured at."""
    session = helpers.session(tmp_path, f"collect.eta={own}", "evaluate.etas=(0.5, 0.1)")
    measured = {}
    monkeypatch.setattr(
        measure,
        "sample_method",
        lambda session, name, *args, number, etas=(), **options: measured.update({(name, number): etas}),
    )
    monkeypatch.setattr(measure, "score_samples", lambda *args, **options: None)
    monkeypatch.setattr(measure, "_write_results", lambda *args: [])
    measure.evaluate(session, None, {1: None}, full=False)  # after the first round
    assert measured["qsharp", 1] == [shared]
    measure.evaluate(session, None, {1: None, 2: None}, full=True)
    assert measured["qsharp", 1] == [shared] and measured["qsharp", 2] == [0.5, 0.1]


def test_samples_at_other_etas_are_made_anew(evaluated, monkeypatch):
    """A file is that of its etas and counts: others are sampled, the same ones are read. inf is pi_ref, null in JSON."""
    session, ref, guides, _ = evaluated
    made = []

    def sample(etas, **changes):
        return measure.sample_method(
            session, "extra", ref, guides[2], models.sampling(session), number=2, etas=etas, **changes
        )

    for etas in ((0.2,), (0.2, 0.3), (math.inf, 0.2)):
        rows = sample(etas)
        assert [row["eta"] for row in rows] == [None if math.isinf(eta) else eta for eta in etas] * 10
        made.append(rows)
        with monkeypatch.context() as patch:
            forbid_sampling(patch)
            assert sample(etas) == rows
    free = [row for row in made[-1] if row["eta"] is None]
    assert not any(row["kl"] for row in free) and all(row["kl"] > 0 for row in made[0])
    with pytest.raises(AssertionError, match="samples again"):
        forbid_sampling(monkeypatch)
        sample(etas, samples=2)


@pytest.fixture
def copied(evaluated, tmp_path):
    """The evaluated session's samples and settings alone: no models, and no device is asked."""
    session = helpers.session(tmp_path, *SETTINGS)
    shutil.copytree(evaluated[0].workdir.samples, session.workdir.samples, dirs_exist_ok=True)
    (session.workdir.samples / "extra_round_2.jsonl").unlink(missing_ok=True)
    return session


def test_a_broken_verdict_is_mended(evaluated, copied, monkeypatch):
    before = {path.name: path.read_text() for path in copied.workdir.samples.iterdir()}
    for name, count in (("cd_round_2", 2), ("pi_ref", 1), ("pi_ref_values_round_2", 1)):
        rows = samples_of(copied, name)
        for row in rows[:count]:
            row["reward"], row["parsed"] = 1.0 - row["reward"], "7"
        measure.write_samples(copied.workdir.samples / f"{name}.jsonl", rows)
    forbid_sampling(monkeypatch)
    rows, changed = measure.rejudge(copied.workdir, judge(copied))
    assert rows == evaluated[3] == json.loads(copied.workdir.results.read_text())
    assert {name: found[:2] for name, found in changed.items()} == {
        "pi_ref.jsonl": (30, 1), "pi_ref_greedy.jsonl": (10, 0), "pi_ref_top_k.jsonl": (20, 0), "qsharp_round_1.jsonl": (20, 0),
        "qsharp_round_2.jsonl": (40, 0), "qsharp_greedy_round_2.jsonl": (10, 0), "cd_round_2.jsonl": (40, 2),
        "qsharp_power_round_2.jsonl": (40, 0),
    }  # fmt: skip
    assert changed["pi_ref.jsonl"][2] == 1
    assert {path.name: path.read_text() for path in copied.workdir.samples.iterdir()} == before


def test_what_cannot_be_judged_again_is_said_and_nothing_is_written(copied):
    path = copied.workdir.samples / "qsharp_round_2.jsonl"
    rows = samples_of(copied, "qsharp_round_2")
    rows[3]["reward"] = 5.0
    del rows[7]["response"]
    measure.write_samples(path, rows)
    content = path.read_text()
    with pytest.raises(UserError, match=f"{path}, line 8, has no 'response'"):
        measure.rejudge(copied.workdir, judge(copied))
    assert path.read_text() == content and not copied.workdir.results.exists()
    values = copied.workdir.samples / "pi_ref_values_round_2.jsonl"
    measure.write_samples(values, measure.read_samples(values)[1:])
    path.unlink()
    with pytest.raises(UserError, match=f"{values} does not match the samples in .*pi_ref.jsonl; delete it"):
        measure.rejudge(copied.workdir, judge(copied))
    (copied.workdir.samples / "pi_ref.jsonl").unlink()
    with pytest.raises(UserError, match="there are no samples of pi_ref in .*run `qsharp evaluate"):
        measure.rejudge(copied.workdir, judge(copied))


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    measure.write_samples(path, [{"a": 1}, {"a": "é\n"}, {"a": [1.5, None]}])
    assert measure.read_samples(path) == [{"a": 1}, {"a": "é\n"}, {"a": [1.5, None]}]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:4], lines[2]]) + "\n")
    with pytest.raises(UserError, match=f"{path}, line 2, is damaged"):
        measure.read_samples(path)


def test_a_line_separator_in_a_text_is_no_end_of_line(tmp_path):
    """Some of Unicode's line ends, and the control characters that `splitlines` takes for some, are plain text here."""
    rows = [{"response": f"one{separator}two"} for separator in "\n\r\v\f\x1c\x85\u2028\u2029"]
    measure.write_samples(tmp_path / "samples.jsonl", rows)
    assert measure.read_samples(tmp_path / "samples.jsonl") == rows


def test_a_guide_less_evaluation_is_pi_refs(copied, monkeypatch, evaluated):
    forbid_sampling(monkeypatch)
    rows = measure.evaluate(copied, evaluated[1], {}, full=True)
    assert [row["method"] for row in rows] == ["pi_ref", "pi_ref_greedy", "pi_ref_top_k"]
    assert rows == evaluated[3][:3]
