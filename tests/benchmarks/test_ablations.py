"""The ablations' plan: which runs there are, and in what they differ; and how methods are compared at one KL."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks import ablations
from qsharp_jax.run import checks, config


def test_a_variant_differs_from_the_default_in_the_settings_that_it_names_and_no_others(tmp_path):
    """But for the etas that it is evaluated at. All that need no model of another shape could run."""
    default = ablations.settings(tmp_path, 0)
    for changes in ablations.plan():
        made = ablations.settings(tmp_path, 0, changes)
        differing = {line.partition(":")[0] for line in config.differences(default, made)} - {"evaluate.etas"}
        assert differing == {change.partition("=")[0] for change in changes}
        if not any(f"guide={name}" in changes for name in ablations.TRUNKS):
            checks.check(made)


def test_every_variant_runs_once_and_the_default_first():
    """Whatever is asked for: the others are compared with it, and take its guide where only decoding differs."""
    every = ablations.plan()
    assert every[0] == () and len(every) == len(set(every)) == len({ablations.folder_name(c) for c in every})
    assert ablations.plan(["types", "rollouts:500"]) == [(), ("collect.prompts=125",), ("value.type=q",)]
    with pytest.raises(ValueError, match="no 'head'; there are .*heads"):
        ablations.plan(["head"])


@pytest.mark.parametrize("ablation", ["rounds", "rollouts"])
def test_rollouts_in_all_are_those_that_the_label_says(tmp_path, ablation):
    for label, changes in ablations.ABLATIONS[ablation].items():
        made = ablations.settings(tmp_path, 0, changes)
        rollouts = made.rounds * made.collect.prompts * made.collect.samples
        assert rollouts == (4800 if ablation == "rounds" else int(label.replace(",", "")))
        assert made.collect.prompts * made.collect.samples % made.collect.shard_rows == 0, "whole shards are shared"


def test_rewards_at_a_kl_are_those_of_a_mixture_within_it():
    rng = np.random.default_rng(0)
    low, middle, high = (rng.random(5) for _ in range(3))
    found = {
        ("pi_ref", float("inf")): ablations.Measured(low, np.zeros(5)),
        ("qsharp", 0.1): ablations.Measured(high, np.full(5, 0.6)),
        ("qsharp", 1.0): ablations.Measured(middle, np.full(5, 0.2)),
        ("cd", 0.1): ablations.Measured(rng.random(5), np.full(5, 0.4)),
    }
    for kl, expected in ((0.0, low), (0.1, (low + middle) / 2), (0.2, middle), (0.4, (middle + high) / 2), (3.0, high)):
        np.testing.assert_allclose(ablations.at_kl(found, "qsharp", kl), expected)


def test_a_figure_is_of_seeds_that_all_its_variants_have():
    """500 rollouts on seeds 0 and 1, 1,200 on 2 alone: a mean over other seeds would look like what is changed."""
    made = {
        (method, eta): ablations.Measured(np.zeros(4), np.zeros(4))
        for method in ("qsharp", "cd")
        for eta in (0.1, 0.02)
    }
    few, more = (ablations.ABLATIONS["rollouts"][label] for label in ("500", "1,200"))
    found = {((), seed): made for seed in (0, 1, 2)} | {(few, 0): made, (few, 1): made, (more, 2): made}
    figure, axes = plt.subplots()
    ablations._plot_rollouts(axes, found)
    assert [text.get_text() for text in axes.texts] == ["seeds: 0, 1"]
    assert {x for line in axes.lines for x in line.get_xdata()} == {500.0, 4800.0}
    plt.close(figure)
