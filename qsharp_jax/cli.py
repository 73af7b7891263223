"""The `qsharp` command: reads arguments, opens the workdir, calls the library, prints. Exit code 2: the user's to mend.

It holds no algorithm: what a command does stands in the module that it calls.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from qsharp_jax import config as configs
from qsharp_jax.errors import UserError
from qsharp_jax.workdir import Workdir, explain_os_error

# JAX and the models are imported by the commands that need them, so that `--help` answers at once.

DESCRIPTION = """\
Guides a frozen language model by a learned distribution of the reward-to-go (Q#, arXiv 2502.20548).

  qsharp run --config configs/arithmetic.py --workdir runs/arithmetic

does everything: it makes or loads the reference model, collects rollouts, fits the guide, evaluates, and writes a
report. Typed again with the same workdir it goes on where it was stopped. The other commands are its single steps."""

CONFIG_HELP = """\
Settings: any value of the config file can be changed by --config.KEY=VALUE, for example --config.seed=1 or
--config.collect.samples=8. A workdir remembers its settings, so later commands need --workdir only."""


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises to install PyTorch, which is not needed
    try:
        options, rest = _parser().parse_known_args(arguments)
        with _open_workdir(options, rest) as workdir:
            options.command(workdir, options)
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # whoever read our output has gone, as in `qsharp generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (sentence := explain_os_error(error)) is None:
            raise
        return _refuse(sentence)
    except KeyboardInterrupt:
        print("\nqsharp: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _refuse(sentence: str) -> int:
    print(f"qsharp: {sentence}", file=sys.stderr)
    return 2


def _open_workdir(options: argparse.Namespace, rest: list[str]) -> Workdir:
    if options.config is None and rest:
        if not rest[0].startswith("--config."):
            raise UserError(f"unknown argument {rest[0]!r}; see qsharp {options.name} --help")
        raise UserError(f"{rest[0]} changes the settings of a run that is there; give the --config it was made with")

    from qsharp_jax import session

    if options.config is not None:
        config = configs.load(options.config, rest)
        session.check(config)
        if not (Path(options.workdir) / "config.json").exists():
            session.check_problems(config)
        return Workdir.open(options.workdir, config)
    workdir = Workdir.open(options.workdir)
    try:
        session.check(workdir.config)  # it may be of an older version, or edited
    except UserError as error:
        workdir.close()
        raise UserError(f"{workdir.path / 'config.json'}: {error}") from None
    return workdir


# --- Commands -------------------------------------------------------------------------------------------------------


def run(workdir: Workdir, options: argparse.Namespace) -> None:
    """pi_ref, then Algorithm 1 with an evaluation after each round, then the report."""
    from qsharp_jax import evaluate, report
    from qsharp_jax.algorithms import pretrain, qsharp
    from qsharp_jax.session import Session

    session = Session(workdir)
    ref = pretrain.run(session)
    guides = {}

    def after_round(number, guide):
        guides[number] = guide
        evaluate.evaluate(session, ref, guides, full=number == session.config.rounds)

    qsharp.run(session, ref, after_round)
    print("\n" + report.write(session))


def collect(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax.algorithms import pretrain, qsharp
    from qsharp_jax.session import Session

    session = Session(workdir)
    number = options.round or min(session.fitted_rounds() + 1, session.config.rounds)
    _check_round(session, number)
    ref = pretrain.run(session)
    guide = session.load_guide(number - 1) if number > 1 else None
    figures = qsharp.collect(session, number, ref, guide)
    print(f"round {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def fit(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax.algorithms import qsharp
    from qsharp_jax.session import Session

    session = Session(workdir)
    number = options.round or max(session.collected_rounds(), 1)
    _check_round(session, number)
    data = qsharp.aggregate(session, number, skip_damaged=options.skip_damaged)
    qsharp.fit(session, number, session.load_ref(), data)
    print(f"round {number}: the guide fitted to {len(data)} rollouts is in {session.guide_folder(number)}")


def generate(workdir: Workdir, options: argparse.Namespace) -> None:
    """Every prompt with every eta, as JSON lines."""
    import numpy as np

    from qsharp_jax import rollouts
    from qsharp_jax.session import Session

    session = Session(workdir)
    given = _generation_settings(options)
    prompts = _read_prompts(options)
    encoded = _encode(session, prompts, given.get("max_new_tokens", session.config.generate.max_new_tokens))
    etas = [session.config.collect.eta] if options.eta is None else options.eta
    if options.output:
        _check_output(options.output)
    ref = session.load_ref()
    guide = None if all(map(math.isinf, etas)) else session.load_guide()
    plan = [(row, eta) for row in range(len(prompts)) for eta in etas for _ in range(options.samples)]
    seeds = np.random.SeedSequence(options.seed).generate_state(len(plan))
    generation = rollouts.sample(
        ref,
        guide,
        [encoded[prompt] for prompt, _ in plan],
        seeds=seeds,
        batch_size=min(len(plan), session.config.evaluate.batch_size),
        eta=np.asarray([eta for _, eta in plan], np.float32),
        mode=options.mode,
        **(session.generation_settings() | given),
    )
    with open(options.output, "w", encoding="utf-8") if options.output else _standard_output() as file:
        for row, (prompt, eta) in enumerate(plan):
            length = generation.lengths[row]

            def numbers(array, row=row, length=length):
                return [round(float(x), 6) if math.isfinite(x) else None for x in array[row, :length]]

            line = {
                "prompt": prompts[prompt],
                "response": session.text.decode(generation.response(row)),
                "tokens": generation.response(row),
                "finished": bool(generation.finished[row]),
                "eta": eta if math.isfinite(eta) else None,
                "seed": int(seeds[row]),
                "log_probs": numbers(generation.log_probs),
                "ref_log_probs": numbers(generation.ref_log_probs),
                "kl": numbers(generation.kl),
                "values": numbers(generation.values),
            }
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def evaluate(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import evaluate, report
    from qsharp_jax.session import Session

    session = Session(workdir)
    ref = session.load_ref()
    last = session.fitted_rounds()
    guides = {number: session.load_guide(number) for number in range(1, last + 1)}
    print(report.table(evaluate.evaluate(session, ref, guides, full=True)))


def report(workdir: Workdir, options: argparse.Namespace) -> None:
    from qsharp_jax import report
    from qsharp_jax.session import Session

    print(report.write(Session(workdir)))


# --- Arguments ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Refuses like the rest of the program: one sentence, not the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qsharp", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(command, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            command.__name__,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=CONFIG_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=command, name=command.__name__)
        sub.add_argument("--workdir", metavar="DIR", required=True, help="the run's folder; made if it is new")
        sub.add_argument(
            "--config", metavar="FILE", required=command is run, help="a Python file with get_config(), as in configs/"
        )
        return sub

    add(run, "everything: reference, rounds of collect and fit, evaluation, report; resumes when repeated")

    sub = add(collect, "collect one round's rollouts: roll in guided, finish with the reference, judge")
    sub.add_argument("--round", type=_whole(1), metavar="K", help="from 1; by default the one after the last fitted")

    sub = add(fit, "fit the guide to all rollouts up to a round")
    sub.add_argument("--round", type=_whole(1), metavar="K", help="from 1; by default the last collected")
    sub.add_argument("--skip-damaged", action="store_true", help="leave out damaged shards, naming each")

    sub = add(generate, "answer prompts with the guided model; JSON lines to standard output")
    sub.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; or use --input")
    sub.add_argument(
        "--input", metavar="FILE", help='a prompt a line, or (.jsonl) JSON lines with a "prompt"; - is standard input'
    )
    sub.add_argument("--output", metavar="FILE", help="where the JSON lines go, by default standard output")
    sub.add_argument(
        "--eta", type=_etas, metavar="LIST",
        help="weights of the KL, as 0.5,0.1: small is strong guidance, inf is the reference alone (eta null in the"
        " output); by default the run's collect.eta",
    )  # fmt: skip
    sub.add_argument("--samples", type=_whole(1), default=1, metavar="N", help="responses to each prompt at each eta")
    sub.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="the same seed gives the same responses")
    sub.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; by default the run's")
    sub.add_argument("--top-p", type=float, metavar="P", help="in (0, 1]; by default the run's")
    sub.add_argument("--top-k", type=int, metavar="K", help="0 for no limit; by default the run's")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="by default the run's")
    sub.add_argument(
        "--mode", choices=("qsharp", "cd", "expectation"), default="qsharp",
        help="how values tilt: log E exp(z/eta), E z/eta, or log E z",
    )  # fmt: skip

    add(evaluate, "measure the reference, Q# and CD on held-out problems; writes results.json")
    add(report, "write report.md and the plots from what was measured")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least {least}")
        return int(text)

    return parse


def _etas(text: str) -> list[float]:
    try:
        etas = [float(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, as 0.5,0.1") from None
    if not all(eta >= configs.LEAST_ETA for eta in etas):
        raise argparse.ArgumentTypeError(f"{text!r}: every eta must be at least {configs.LEAST_ETA:g}")
    return etas


def _check_round(session, number: int) -> None:
    if not 1 <= number <= session.config.rounds:
        raise UserError(f"round {number} is not one of this run's 1 .. {session.config.rounds}")


def _generation_settings(options: argparse.Namespace) -> dict:
    """Those of the run's settings that the arguments change."""
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        passes, words = configs.RULES[f"generate.{name}"]
        if not passes(value):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {words}")
    return given


def _encode(session, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    encoded, limit = [session.text.encode_prompt(prompt) for prompt in prompts], session.ref_config.max_positions
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if len(tokens) + max_new_tokens > limit:
            raise UserError(
                f"the prompt {prompt[:60]!r} has {len(tokens)} tokens, which with {max_new_tokens} new ones is more"
                f" than the model's {limit} positions; shorten the prompt, or give a smaller --max-new-tokens"
            )
    return encoded


def _check_output(path: str) -> None:
    """Before anything is computed: the file can be written. What it holds stays until there is something to write."""
    try:
        open(path, "a").close()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} cannot be written, for its folder is not there; make it, or give another --output"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give --output the path of a file") from None


def _read_prompts(options: argparse.Namespace) -> list[str]:
    """Prompts from the arguments, or from the file or standard input, one a line."""
    if options.prompts and options.input:
        raise UserError("give prompts as arguments or by --input, not both")
    if options.prompts:
        return options.prompts
    name = "standard input" if options.input in (None, "-") else options.input
    try:
        data = sys.stdin.buffer.read() if name == "standard input" else Path(name).read_bytes()
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {name}; give --input the path of a file of prompts") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{name} is no text in UTF-8; give prompts as text, one a line") from None
    # Not `splitlines`: JSON has some of its line ends inside strings.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{name} holds no prompts; write one a line")
    if not name.endswith(".jsonl"):
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'{name}, line {number}: expected a JSON object with a text as its "prompt"')
        prompts.append(prompt)
    return prompts


def _standard_output():
    return os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
