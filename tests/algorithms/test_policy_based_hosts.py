"""The policy methods on two processes: the problems are shared, and what comes of it is what one process does.

The processes are this file run as a script, with a device each, on the bandit with prompts of several lengths.
"""

import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import bandit_task as bandit
import helpers
import jax
import numpy as np
import pytest
from marks import slow
from processes import free_port, start

from qsharp_jax import rollouts
from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.data.records import read_rounds
from qsharp_jax.models import sharding
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import multihost, sigterm
from qsharp_jax.system.errors import Stopped
from qsharp_jax.system.multihost import Place
from qsharp_jax.tasks import judging, registry
from qsharp_jax.tasks.base import Problem

TASK = types.SimpleNamespace(
    **vars(bandit.TASK)
    | dict(
        problems=lambda config, split, count, seed: [
            Problem(f"{split}{n}", "?" * (1 + n % 3), "") for n in range(count)
        ]
    )
)
# Lots of 4, 4 and 3 problems. Rows are divided alike over two devices and over two processes: sums have one order, and
# the optimizer makes nothing of their rounding.
SMALL = (
    "collect.prompts=11", "policy.prompts=5", "collect.samples=4", "policy.batch_size=8", "collect.shard_rows=4",
    "fit.log_every=1",
)  # fmt: skip
ALONE = (
    "collect.prompts=3", "policy.prompts=1", "policy.optimizer.name=adamw", "policy.optimizer.learning_rate=0.0001"
)  # fmt: skip
SLOW = ("collect.prompts=4000", "policy.prompts=4000", "collect.samples=1")


# --- In the other processes -----------------------------------------------------------------------------------------


def main(count: int, port: int, index: int, act: str, folder: Path, *settings: str) -> None:
    """Runs the session's algorithm, as one of two processes with a device each, or as the one with two."""
    registry.TASKS["bandit"] = TASK
    meet = multihost.joined(Place("localhost", port, 2, index), 200, explain)
    with meet if count == 2 else contextlib.nullcontext(sigterm.Peers()) as peers:
        session = bandit.session(folder / str(index), *settings)
        multihost.wait_for_all("the workdir is open")
        if index:
            session = Session(Workdir.attach(folder / "0", session.config))
        mesh = configs.presets(helpers.ARITHMETIC)["cpu"] | dict(hosts=count, devices_per_host=2 // count)
        mesh |= dict(decode=dict(data=2 // count, attention_data=1, tensor=1), fit=dict(data=2, fsdp=1, tensor=1))
        session.config.mesh.update(mesh)
        if act == "judge":
            TASK.reward = slowly(TASK.reward)
        if act == "sample":
            rollouts.sample = announced(rollouts.sample)
        with sigterm.sigterm_ends(lambda: peers.end(0, "at once"), peers):
            train(session, folder / f"{index}.npz")


def train(session: Session, file: Path) -> None:
    """Runs the algorithm; the file gets the policy, and how many prompts were sampled and responses judged here."""
    here = {"sampled": 0, "judged": 0}
    sample, submit = rollouts.sample, judging.Judge.submit

    def counting_sample(ref, guide, prompts, sampling, **settings):
        here["sampled"] += len(prompts)
        return sample(ref, guide, prompts, sampling, **settings)

    def counting_submit(*arguments, **options):
        here["judged"] += 1
        return submit(*arguments, **options)

    rollouts.sample, judging.Judge.submit = counting_sample, counting_submit
    ref = session.for_decoding(bandit.reference(session))
    policy = ALGORITHMS[session.config.algorithm].run(session, ref, lambda number, policy: None)
    leaves = jax.tree.leaves_with_path(sharding.to_host(policy.params))
    np.savez(file, **here, **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


def explain(error: BaseException) -> tuple[int, str]:
    return (0, "saved") if isinstance(error, Stopped) else (2, repr(error))


def slowly(reward):
    print_once = functools.cache(functools.partial(print, "judge", flush=True))

    def judged(problem, response):
        print_once()
        time.sleep(0.05)
        return reward(problem, response)

    return judged


def announced(sample):
    def announcing(*arguments, **settings):
        print("sample", flush=True)
        return sample(*arguments, **settings)

    return announcing


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]), *sys.argv[6:])


# --- Here -----------------------------------------------------------------------------------------------------------


def begin(count: int, act: str, folder: Path, *settings: str) -> list[subprocess.Popen]:
    port = str(free_port())
    return [
        start(__file__, str(count), port, str(index), act, str(folder), *settings, devices=2 // count)
        for index in range(count)
    ]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


SAME = ("phase", "step", "rollouts", "pairs", "reward", "response_tokens", "finished")
CLOSE = ("loss", "gradient_norm", "kl", "objective")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(slow(name, ()) for name in ("ppo", "klq", "reinforce", "dpo")),
        # With lots of one problem, of which one process has none. The rows are then divided otherwise than over devices.
        slow("ppo", ALONE),
    ],
)
def test_two_processes_share_the_problems_and_train_as_one(name, changes, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    started = [
        process
        for count, folder in ((1, one), (2, two))
        for process in begin(count, "train", folder, name, *SMALL, *changes)
    ]
    outputs = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs

    expected, *parts = (dict(np.load(file)) for file in (one / "0.npz", two / "0.npz", two / "1.npz"))
    for count in ("sampled", "judged"):
        shares = [int(part.pop(count)) for part in parts]
        assert sum(shares) == expected.pop(count)
        assert 0 < max(shares) < sum(shares) or changes == ALONE or (name, count) == ("dpo", "sampled")
    records = [read_rounds(folder / "0" / "rollouts", [1]) for folder in (one, two)]
    assert records[0] == records[1] != []
    if changes == ALONE:  # a lot without a reward teaches rounding alone, of which the optimizer makes whole steps
        return
    lines = [metrics(folder / "0") for folder in (one, two)]
    assert len({line["reward"] for line in lines[0] if "reward" in line}) > 1 or name == "dpo"
    for ours, theirs in zip(*lines, strict=True):
        assert [ours.get(key) for key in SAME] == [theirs.get(key) for key in SAME]
        for key in set(CLOSE) & ours.keys():
            np.testing.assert_allclose(theirs[key], ours[key], atol=1e-5, err_msg=key)
    for part in parts:
        for leaf in expected:
            np.testing.assert_allclose(part[leaf], expected[leaf], atol=1e-5, err_msg=leaf)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["sample", "judge"])
def test_a_sigterm_to_one_while_they_sample_or_judge_ends_both_within_seconds(act, tmp_path):
    """They would be at it for minutes; the state before is saved, and nothing of the lot is."""
    started = begin(2, act, tmp_path, "ppo", *SMALL, *SLOW)
    for process in started:
        while (line := process.stdout.readline()) and line != f"{act}\n":
            pass
    time.sleep(1)
    began = time.monotonic()
    started[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in started]
    seconds = time.monotonic() - began
    assert [process.returncode for process in started] == [0, 0], outputs
    assert seconds < 20, "half a minute is what clouds give"
    for _, errors in outputs:
        assert errors.splitlines()[-1] == "qsharp: saved"
    folder = tmp_path / "0" / "guide" / "round_1" / "training"
    assert [path.name for path in folder.iterdir() if path.name.isdecimal()] == ["0"]
    assert not list((tmp_path / "0").rglob("*.parquet"))
