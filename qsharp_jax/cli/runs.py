"""The commands on a run's workdir: everything, its single steps, and its models as folders for other programs."""

import argparse

from qsharp_jax.run import config as configs
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    """pi_ref, then the config's algorithm with an evaluation after each round, then the report."""
    from qsharp_jax import report
    from qsharp_jax.experiments import pipeline
    from qsharp_jax.run.session import Session

    session = Session(workdir, options.profile)
    pipeline.run(session)
    if workdir.writes:
        print("\n" + report.write(session))


def compare(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax.experiments import compare

    print("\n" + compare.run(workdir))


def collect(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import algorithms
    from qsharp_jax.run import models, pretrain, provenance
    from qsharp_jax.run.session import Session

    session = Session(workdir)
    algorithm = algorithms.get(session.config.algorithm)
    _check_collects(session)
    provenance.check_problems(session)
    number = options.round or min(models.fitted_rounds(session.workdir) + 1, session.config.rounds)
    _check_round(session, number)
    ref = pretrain.run(session)
    guide = models.load_guide(session, number - 1) if number > 1 else None
    figures = algorithm.collect(session, number, ref, guide)
    print(f"round {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def fit(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import algorithms
    from qsharp_jax.run import checks, models
    from qsharp_jax.run.session import Session

    session = Session(workdir, options.profile)
    algorithm = algorithms.get(session.config.algorithm)
    _check_collects(session)
    checks.check_devices(session)
    number = options.round or max(session.workdir.collected_rounds(), 1)
    _check_round(session, number)
    data = algorithm.aggregate(session, number, skip_damaged=options.skip_damaged)
    previous = models.load_guide(session, number - 1) if session.config.fit.warm_start and number > 1 else None
    ref = None if models.folder(session.config, "ref") else models.load_ref(session)
    algorithm.fit(session, number, ref, data, previous)
    print(f"round {number}: the guide fitted to {len(data)} rollouts is in {session.workdir.guide_folder(number)}")


def evaluate(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import algorithms, report
    from qsharp_jax.evaluation import measure
    from qsharp_jax.run import models, provenance
    from qsharp_jax.run.session import Session

    session = Session(workdir)
    if options.rejudge:
        rows, changed = measure.rejudge(session)
        print(report.table(rows) + "\n")
        for name, (samples, verdicts, parsed) in changed.items():
            print(f"{name}: of {samples} verdicts {verdicts} changed, and {parsed} answers are read otherwise")
        return
    provenance.check_problems(session)
    ref = models.load_ref(session)
    last = models.fitted_rounds(session.workdir)
    guides = {number: models.load_guide(session, number) for number in range(1, last + 1)}
    config = session.config
    mode = None if configs.trains_policy(config) else algorithms.get(config.algorithm).mode(config)
    print(report.table(measure.evaluate(session, ref, guides, full=True, mode=mode)))


def report(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import report
    from qsharp_jax.run.session import Session

    print(report.write(Session(workdir)))


def plan(workdir: None, options: argparse.Namespace) -> None:
    """On the config alone; a run that cannot be is refused after what can be said about it."""
    from qsharp_jax import plan

    presets = configs.presets(options.config)
    section = options.settings.get("mesh") or presets["single"]
    job = plan.make(
        options.settings, ref_size=options.ref_size, guide_size=options.guide_size, prompt_tokens=options.prompt_tokens
    )
    try:
        for line in plan.lines(job, section, compile=options.compile):
            print(line, flush=True)
    finally:
        plan.check(job, section, presets)


def export(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax.experiments import export
    from qsharp_jax.run.session import Session

    export.write(Session(workdir), options.what, options.out)
    print(f"the {'reference' if options.what == 'ref' else 'guide'} is in {options.out}")


def _check_collects(session) -> None:
    """That the run's algorithm collects and fits in separate steps."""
    if configs.trains_policy(session.config):
        raise UserError(
            f"{session.config.algorithm} trains a policy, and collects as it does so; use qsharp run, which goes on"
            " where it stopped"
        )


def _check_round(session, number: int) -> None:
    if not 1 <= number <= session.config.rounds:
        raise UserError(f"round {number} is not one of this run's 1 .. {session.config.rounds}")
