"""The record of an algorithm: everything about it that the rest of the package reads."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An algorithm, one per name in `config.algorithm`."""

    name: str  # its name in the config, in files and on the command line
    # label, color: its name in tables and plots, and its color in plots, as in matplotlib
    label: str
    color: str
    # a "guide", which is a `ValueModel` beside pi_ref, or a "policy", which is a trained copy of pi_ref
    learns: Literal["guide", "policy"]
    # (session, ref, after_round) -> the last guide or policy. It runs all rounds, resumes from the workdir, and calls
    # `after_round(number, guide)` after each.
    run: Callable[..., Any]
    # an instance of its settings' dataclass, with the defaults; None without settings. The config's section has the
    # algorithm's name.
    settings: Any = None
    eta: str | None = None  # the setting that is its weight of the KL; None: `collect.eta`
    # whether it learns from rollouts of its own policy; other algorithms' first rollouts are pi_ref's
    on_policy: bool = False
    rolls_in: bool = False  # whether the rollouts after the first round begin with its guide
    # config -> the mode of `guidance.MODES` in which its guide tilts pi_ref; None for a policy
    mode: Callable[[ConfigDict], str | None] = lambda config: None
    # further modes in which the last guide is evaluated; a mode is also the method of its rows
    extra_modes: tuple[str, ...] = ()
    # config -> None; raises a UserError unless its settings go with the others
    check: Callable[[ConfigDict], None] = lambda config: None
    # collect, fit: the steps of a round that learns a guide, for `qsharp collect` and `qsharp fit`: (session, number,
    # ref, guide) -> statistics, and (session, number, ref, data, previous guide) -> guide
    collect: Callable[..., dict[str, float]] | None = None
    fit: Callable[..., Any] | None = None
    # data -> the rollouts whose gradients an epoch takes, for the budgets of `qsharp compare`; used for algorithms with
    # a setting `epochs`
    epoch_rollouts: Callable[[Sequence], Sequence] = lambda data: data
