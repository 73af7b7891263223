"""`qsharp evaluate`: measure a run's models on held-out problems."""

import argparse

from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, add_processes, add_workdir
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError

SUMMARY = "measure the reference and what was learned on held-out problems; writes results.json"
EPILOG = (
    CONFIG_HELP
    + """

A run's models measured again, with other etas, problems or candidates, into a folder of their own:

  qsharp evaluate --of runs/short --workdir runs/short_more --config.evaluate.etas=0.3,0.15"""
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    add_config(parser)
    add_processes(parser)
    parser.add_argument(
        "--of", metavar="RUN",
        help="measure the models of the run in this folder, with its settings but for those of evaluate and generate"
        " that are changed by --config.KEY=VALUE; the workdir is the measurement's own",
    )  # fmt: skip
    parser.add_argument(
        "--rejudge", action="store_true",
        help="judge the stored samples again, without a model, and rewrite their files and results.json",
    )  # fmt: skip


def check_arguments(options: argparse.Namespace) -> None:
    if options.of is not None and options.config is not None:
        raise UserError("--of takes the settings of its run; leave --config out, and change some by --config.KEY=VALUE")
    if options.of is not None and options.rejudge:
        raise UserError("--rejudge judges the samples in --workdir; leave --of out")


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import report
    from qsharp_jax.evaluation import measure
    from qsharp_jax.run import models, provenance
    from qsharp_jax.run.problems import judge
    from qsharp_jax.run.session import Session

    session = Session(workdir)
    if options.rejudge:
        rows, changed = measure.rejudge(workdir, judge(session))
        print(report.table(rows, width=report.TERMINAL) + "\n")
        for name, (samples, verdicts, parsed) in changed.items():
            print(f"{name}: of {samples} verdicts {verdicts} changed, and {parsed} answers are read differently")
        return
    provenance.check_problems(session)
    ref = models.load_ref(session)
    guides = {number: models.load_guide(session, number, ref) for number in range(1, models.fitted_rounds(workdir) + 1)}
    print(report.table(measure.evaluate(session, ref, guides, full=True), width=report.TERMINAL))
