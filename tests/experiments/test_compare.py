"""Comparisons: what a run took, by its metrics; equal budgets; and a whole small one, stopped and gone on with."""

import dataclasses
import json
from types import SimpleNamespace

import bandit_task as bandit
import matplotlib.pyplot as plt
import numpy as np
import pytest
from ml_collections import ConfigDict
from repository import CONFIGS

from qsharp_jax.algorithms import dpo
from qsharp_jax.algorithms.policy_based import OnPolicyTraining
from qsharp_jax.data.records import Rollout, Rollouts
from qsharp_jax.experiments import compare
from qsharp_jax.models.config import DecoderConfig
from qsharp_jax.run import config, models, pretrain
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError
from qsharp_jax.tasks import registry


@pytest.fixture(autouse=True)
def bandit_is_a_task(monkeypatch):
    monkeypatch.setitem(registry.TASKS, "bandit", bandit.TASK)


def comparison(tmp_path, *changes, methods=("qsharp", "reinforce"), seeds=(0,), **of_methods) -> ConfigDict:
    with bandit.session(tmp_path / "settings", "qsharp", "collect.prompts=32", *changes).workdir as workdir:
        made = workdir.config
    with made.unlocked():
        made.compare = ConfigDict(dict(methods=methods, seeds=seeds, changes=of_methods))
    return made


def step(phase, number, seconds, flops, rate=10.0, tokens=100.0):
    return {
        "phase": phase, "step": number, "loss": 0.1, "seconds": seconds, "flops": flops, "flops_per_second": rate,
        "tokens_per_second": tokens,
    }  # fmt: skip


def lot(phase, number, rollouts):
    return {"phase": phase, "step": number, "rollouts": rollouts, "objective": 0.0}


def test_costs_are_those_of_the_rounds_and_lines_that_came_twice_count_once():
    """Killed after step 4 of round 1 and gone on with from step 2, where it was saved."""
    a, b = "round 1: ppo", "round 2: ppo"
    metrics = [
        step("pre-train pi_ref", 9, 50.0, 1e9),
        lot(a, 0, 8), step(a, 2, 3.0, 20.0), lot(a, 2, 8), step(a, 4, 1.0, 20.0),
        lot(a, 2, 8), step(a, 4, 2.0, 20.0), {"phase": a, "step": 4, "nll": 0.3},
        lot(b, 0, 4), step(b, 2, 0.5, 10.0, rate=5.0, tokens=40.0),
    ]  # fmt: skip
    found = compare.costs(metrics)
    assert found["seconds"] == pytest.approx(3.0 + 2.0 + 0.5)
    assert found["rollouts"] == 8 + 8 + 4
    assert found["flops"] == 50.0
    busy = [20.0 / 10, 20.0 / 10, 10.0 / 5]
    assert found["tokens_per_second"] == pytest.approx((100 * busy[0] + 100 * busy[1] + 40 * busy[2]) / sum(busy))


def test_a_collection_that_found_its_shards_took_what_the_first_one_took():
    collect = {"phase": "round 1: collect", "rollouts": 24}
    metrics = [collect | {"seconds": 7.0}, collect | {"seconds": 0.1}, step("round 1: fit", 5, 4.0, 30.0)]
    found = compare.costs(metrics)
    assert (found["seconds"], found["rollouts"]) == (11.0, 24)
    assert compare.costs(metrics, ("collect",))["seconds"] == 7.0


def test_epochs_fill_the_budget(tmp_path):
    """Count by hand: 6 N FLOPs a token and 12 L H E n more for a sequence of n, as PaLM counts them."""
    session = bandit.session(tmp_path, "qsharp", "rounds=2", "collect.prompts=5", "fit.epochs=7", "fit.holdout=0.1")
    lengths = [2, 3, 3, 3, 2, 3]
    rewards = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    data = Rollouts.of(
        Rollout(f"p{i // 3}", 1, [1], [2] * (n - 1), 0, r, True, 1.0, 0, "")
        for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))
    )
    c: DecoderConfig = models.ref_config(session)
    kernels = c.layers * (4 * c.embed * c.heads * c.head_dim + 3 * c.embed * c.mlp)

    def flops(lengths, head):
        lengths = np.asarray(lengths)
        return 6 * (kernels + head) * lengths.sum() + 12 * c.layers * c.heads * c.head_dim * (lengths**2).sum()

    budget, epochs = compare.budget(session, data)
    assert budget == pytest.approx(7 * (1 + 2) * 0.9 * flops(lengths, c.embed))
    once, pairs = flops(lengths, c.embed * c.vocab_size), flops([3, 2, 3, 3], c.embed * c.vocab_size)
    assert epochs["ppo"] == epochs["klq"] == round(budget / (2 * once)) > 3
    assert epochs["dpo"] == epochs["rpo"] == round(budget / (3 * pairs)) > epochs["ppo"] / 2
    assert "reinforce" not in epochs


def test_the_pairs_of_problems_that_come_in_every_round_are_counted(tmp_path, monkeypatch):
    """Two rounds of one problem with a right and a wrong response each: a pair, then four."""
    session = bandit.session(tmp_path, "qsharp", "rounds=2", "fit.epochs=90", "fit.holdout=0")
    data = Rollouts.of(Rollout("p", 1, [1], [2, 2], 0, reward, True, 1.0, 0, "") for reward in (0.0, 1.0))
    _, new = compare.budget(session, data)
    monkeypatch.setattr(compare, "task", lambda session: SimpleNamespace(FINITE=True))
    budget, epochs = compare.budget(session, data)
    again = Rollouts.of([*data, *(dataclasses.replace(rollout, round=2) for rollout in data)])
    pairs = [len(dpo.make_pairs(rollouts)[0]) for rollouts in (data, again)]
    assert pairs == [1, 4]
    per_pair = budget / new["dpo"] / (1 + 2)
    assert epochs["dpo"] == epochs["rpo"] > 20 and epochs["dpo"] == pytest.approx(budget / 5 / per_pair, abs=1)
    assert epochs["ppo"] == epochs["klq"] == new["ppo"] == new["klq"]


def test_the_settings_of_a_method(tmp_path):
    made = comparison(
        tmp_path, "evaluate.etas=0.5,0.1", methods=("qsharp", "ppo"), ppo=("ppo.clip=0.3", "policy.prompts=8")
    )
    its = compare.settings(made, 4, "ppo", epochs=9)
    assert (its.seed, its.algorithm, its.ppo.epochs, its.ppo.clip, its.policy.prompts) == (4, "ppo", 9, 0.3, 8)
    assert its.evaluate.etas == (its.collect.eta,) and "compare" not in its and its.is_locked
    assert (made.seed, made.algorithm, made.policy.prompts, "compare" in made) == (0, "qsharp", 16, True)
    stronger = comparison(tmp_path, methods=("qsharp", "cd"), cd=("collect.eta=0.05",))
    assert compare.settings(stronger, 0, "cd").evaluate.etas == (0.05,), "measured at its own eta"
    with made.unlocked():
        made.compare.methods = ("qsharp", "cd")  # those of a method that is left out are no error
    compare.check(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.__delattr__("compare"), "lacks the setting compare.methods"),
        (
            lambda c: c.compare.changes.update(reinforc=("ppo.clip=0.1",)),
            "changes has the unknown method reinforc; did you mean 'reinforce'",
        ),
        (lambda c: c.compare.changes.update(reinforce=("reinforce.clip=0.1",)), "no setting --config.reinforce.clip"),
        (lambda c: c.compare.changes.update(reinforce=("policy.batch_size=6",)), "a multiple of .*samples, 4"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_computed(tmp_path, change, words):
    made = comparison(tmp_path)
    with made.unlocked():
        change(made)
    with pytest.raises(UserError, match=words):
        compare.check(made)


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        (("collect.eta=0.05", "fit.epochs=3"), {"samples/pi_ref.jsonl", "rollouts/round_1/shard-00000.parquet"}),
        (("collect.samples=8",), {"samples/pi_ref.jsonl"}),
        (("generate.temperature=0.5",), set()),
        (("evaluate.samples=7",), {"rollouts/round_1/shard-00000.parquet"}),
    ],
)
def test_a_method_with_other_settings_draws_its_own_samples_and_rollouts(tmp_path, monkeypatch, changes, shared):
    made = comparison(tmp_path, methods=("qsharp", "cd"), cd=changes)
    Workdir.open(tmp_path / compare.SHARED, compare.settings(made, 0, "qsharp")).close()
    for name in ("samples/pi_ref.jsonl", "rollouts/round_1/shard-00000.parquet"):
        path = tmp_path / compare.SHARED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(compare.pipeline, "run", lambda session: None)
    with Workdir.open(tmp_path / "cd", compare.settings(made, 0, "cd")) as workdir:
        compare._run_method(Session(workdir), tmp_path / compare.SHARED)
        copied = {
            str(path.relative_to(workdir.path))
            for name in ("samples", "rollouts") for path in (workdir.path / name).rglob("*.*")
        }  # fmt: skip
    assert copied == shared


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("compare_*.py")))
def test_every_comparison_can_be_run(name):
    """And no method's learning rate is warmed up for half of a round's updates."""
    made = config.load(CONFIGS / f"{name}.py", [])
    compare.check(made)
    assert set(made.compare.methods) == {"qsharp", "cd", "vas", "reinforce", "ppo", "klq", "dpo", "rpo"}
    for method in made.compare.methods:
        its = compare.settings(made, 0, method)
        rollouts, section = its.collect.prompts * its.collect.samples, its.policy
        updates = rollouts / its.policy.batch_size * (its[method].epochs if method in ("ppo", "klq") else 1)
        if method in ("qsharp", "cd", "vas"):
            updates, section = rollouts / its.fit.batch_size * its.fit.epochs, its.fit
        if method not in ("dpo", "rpo"):  # whose updates depend on the rewards
            assert section.optimizer.warmup_steps < updates / 2


def test_objectives_are_at_the_comparison_s_eta_whatever_a_method_s_own(tmp_path, monkeypatch):
    """In the rows, and in the curves of rollouts; a reward of 0.6 at 2 nats is 0.4 at eta 0.1."""
    recipe = comparison(
        tmp_path, "collect.eta=0.1", methods=("cd", "klq", "dpo"),
        cd=("collect.eta=0.05",), klq=("klq.tau=0.5",), dpo=("dpo.beta=0.7",),
    )  # fmt: skip
    folder = tmp_path / "all" / "seed_0"
    Workdir.open(folder / compare.SHARED, compare.settings(recipe, 0, "qsharp")).close()
    monkeypatch.setattr(compare, "_rewards", lambda *_: [0.6])
    result = dict(round=1, reward=0.6, kl=2.0, kl_truncated=2.0)
    for method in recipe.compare.methods:
        with Workdir.open(folder / method, compare.settings(recipe, 0, method)) as workdir:
            workdir.results.write_text(json.dumps([result | {"method": name} for name in (method, compare.GREEDY)]))
            batch = lot(f"round 1: {method}", 0, 8) | {"log_prob_gap": 0.0, "reward": 0.6, "kl": 2.0, "objective": -9.0}
            workdir.append_metrics(batch)
            rows = [
                compare._row(Session(workdir), folder, 0, 1.0, 0.1),
                compare._row_of_samples(folder / method, 0, compare.GREEDY, 0.1, 1),
            ]
            assert [row["objective"] for row in rows] == pytest.approx([0.4, 0.4])
    with Workdir.open(tmp_path / "all", recipe) as workdir:
        ((key, (batch,)),) = compare._curves(workdir).items()
    assert key == ("klq", 0) and batch["objective"] == pytest.approx(0.4)


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on_and_names_what_has_no_result(tmp_path, monkeypatch, capsys):
    """One pi_ref and one set of first rollouts; a method that is refused does not end the others; nothing twice."""
    pretrained = []

    def no_pretraining(session):
        pretrained.append(session.workdir.ref)
        return bandit.reference(session)

    monkeypatch.setattr(pretrain, "run", no_pretraining)
    settings = comparison(
        tmp_path, "fit.epochs=1", methods=("qsharp", "reinforce", "klq"), klq=("policy.log_prob_limit=1e-12",)
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OnPolicyTraining, "sample", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with Workdir.open(tmp_path / "all", settings) as workdir:
            compare.run(workdir)
    folder = tmp_path / "all" / "seed_0"
    fitted = {path: path.stat().st_mtime_ns for path in (folder / "qsharp" / "guide").rglob("*") if path.is_file()}
    assert fitted and not (tmp_path / "all" / "report.md").exists()

    with Workdir.open(tmp_path / "all", settings) as workdir:
        text, failures = compare.run(workdir)
    assert {path: path.stat().st_mtime_ns for path in fitted} == fitted
    assert set(pretrained) == {folder / "pi_ref" / "ref"}
    shards = [sorted((folder / name / "rollouts" / "round_1").iterdir()) for name in ("pi_ref", "qsharp", "reinforce")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    assert len(shards[2]) == 2, "a policy's own, a shard per batch"

    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert {"pi_ref", "pi_ref, top-K", "Q#", "Q#, greedy", "REINFORCE"} <= lines.keys() and "KLQ" not in lines
    assert "128 of 128" in lines["Q#"] and "128 of 128" in lines["REINFORCE"]
    assert "KLQ, seed 0: klq, round 1, batch 0: the log-probabilities" in text and len(failures) == 1 and failures[0] in text
    assert "KLQ, seed 0" in capsys.readouterr().err
    made = json.loads((tmp_path / "all" / "results.json").read_text())
    rows = {row["method"]: row for row in made["runs"]}
    assert rows["qsharp"]["flops"] == pytest.approx(rows["qsharp"]["flops_budget"], rel=0.1)
    assert 0 < rows["reinforce"]["flops"] < 2 * rows["reinforce"]["flops_budget"]
    trained = [rows[name] for name in ("qsharp", "reinforce")]
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 for row in trained)
    for name in ("pi_ref_top_k", "qsharp_greedy"):  # what is measured is what was sampled
        assert "seconds" not in rows[name] and rows[name]["kl"] > 0
    assert {"report.md", "frontier.png", "costs.png", "learning.png"} <= {p.name for p in (tmp_path / "all").iterdir()}
    with Workdir.open(folder / "reinforce") as its:
        assert its.ref == folder / "pi_ref" / "ref"
        assert not config.differences(its.config, compare.settings(settings, 0, "reinforce"))


def test_a_summary_s_interval_is_over_seeds_and_says_how_many():
    common = dict(kl=1.0, objective=0.1)
    rewards = {0: [0.0, 0.1], 1: [0.3, 0.326], 2: [0.303, 0.303]}
    rows = [dict(seed=seed, method="dpo", rewards=of, **common) for seed, of in rewards.items()]
    rows.append(dict(seed=0, method="cd", rewards=[0.0, 1.0, 1.0, 1.0], **common))
    dpo, cd = compare.summary(rows)
    assert dpo["reward"] == pytest.approx(0.222) and dpo["by_seed"] == pytest.approx({0: 0.05, 1: 0.313, 2: 0.303})
    assert dpo["reward_low"] < 0.05 and dpo["reward_high"] > 0.313
    assert (cd["reward_low"], cd["reward_high"]) == (0.25, 1.0)
    first, second = compare.table([dpo, cd], 100).splitlines()[2:]
    assert "-0.148 .. 0.592 (3 seeds)" in first and "0.250 .. 1.000 (1 seed, problems alone)" in second


def test_a_method_that_fails_does_not_flatten_the_learning_curves():
    ends = {"pi_ref": 0.3, "qsharp": 0.7, "ppo": 0.5, "dpo": -23.5}
    lots = [dict(rollouts_so_far=64 * n, objective=0.3 + 0.01 * n) for n in range(20)]
    figure, axes = plt.subplots()
    compare._plot_learning(axes, [dict(method=m, objective=end) for m, end in ends.items()], {("ppo", 0): lots})
    assert axes.get_ylim()[0] > -2
    assert "DPO: -23.5" in [text.get_text() for text in axes.get_legend().get_texts()]
    plt.close(figure)
