"""The commands' arguments: what may be given, with what by default, and what `--help` says about it."""

import argparse
import dataclasses
import datetime
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import qsharp_jax.cli.runs as runs
import qsharp_jax.cli.texts as texts
from qsharp_jax.sampling import LEAST_ETA, MODES, OTHERS, Sampling
from qsharp_jax.system.errors import UserError

DESCRIPTION = """\
Guides a frozen language model by a learned distribution of the reward-to-go (Q#, arXiv 2502.20548).

  qsharp run --config configs/arithmetic.py --workdir runs/arithmetic

does everything: it makes or loads the reference model, collects rollouts, fits the guide, evaluates, and writes a
report. Typed again with the same workdir it goes on where it was stopped. The other commands are its single steps.
With models of your own, a folder for each with config.json, safetensors and tokenizer files:

  qsharp generate --ref DIR --guide DIR "a prompt"
  qsharp score --ref DIR --guide DIR --input FILE --output FILE"""

CONFIG_HELP = """\
Settings: any value of the config file can be changed by --config.KEY=VALUE, for example --config.seed=1 or
--config.collect.samples=8. A workdir remembers its settings, so later commands need --workdir only. Models in folders
instead of those made on the spot: --config.ref=DIR, and --config.guide=DIR for what the guide starts from."""

FOLDERS_HELP = """\
Models: those of a run, by --workdir, or of folders with config.json, safetensors and tokenizer files, as
`transformers` and `qsharp export` write them, by --ref and --guide. The guide's tokenizer must have the reference's
entries, but for special tokens that neither model uses; paddings of the embeddings may differ."""

GENERATE_HELP = f"""\
A line of the output is a JSON object with the "prompt", the "response" and its "tokens", whether it "finished" (by a
stop token), its "eta" and "seed", of every token "log_probs", "ref_log_probs", "kl" and "values" (null where there is
none), and the "settings" that all lines have in common. Standard output has them in the order of the prompts, each as
soon as it and those before it have ended. --output gets each as it ends, and has them in the order of the prompts when
all are there. The same command, typed again after it was stopped, goes on behind what is there; prompts may be added at
the end of the input. A file by other models or settings is refused.

{FOLDERS_HELP}"""

SCORE_HELP = f"""\
A line of the input is a JSON object with texts, {{"prompt": ..., "response": ...}}, or with token ids,
{{"prompt_tokens": [...], "response_tokens": [...]}}, which come first where both are there. A response given as text
is scored with the token that ends it: in the chat format the end of a turn, else eos. For one that has no end give
tokens. The output has the same lines and fields, with

  ref_log_probs  of every response token after those before it, in nats, under the reference at temperature 1
  values         the mean reward-to-go that the guide gives every response token
  value          the last of these

It grows in the order of the input; the same command, typed again after it was stopped, goes on behind what is there.
Where the chat template writes the date, give --date, so that it goes on with the same prompts on another day.

{FOLDERS_HELP}"""


JUDGE_HELP = """\
A line of the input is a JSON object with a text "response", and an "answer", the right one as the task's data set has
it, or else the "problem_id" of one of its problems. The output has the same lines and fields, with

  reward  1.0 for a right answer, else 0.0
  parsed  the answer that was found in the response, null if there is none

Answers that are mathematics are the same if they are so as texts, as rational numbers, or by `math_verify`, which runs
in processes of its own, with bounded time and memory for each answer. The file is written whole, at the end."""


PLAN_HELP = f"""\
No workdir, no device and no weights are needed: of folders their config.json. What a chip holds and does in a step of
the fit and of decoding, for the mesh of the config, by arithmetic; each number says how it was found. For example

  qsharp plan --config configs/arithmetic.py --config.mesh=v5p_64 --ref-size llama3.1-70b --guide-size llama3.2-3b

A mesh that cannot be is refused with the nearest that can. Its memory, bandwidths and peak are the vendor's figures in
configs/meshes.py; of `single` and `cpu` nothing is known, so give them as --config.mesh.hbm_bytes=16000000000.

{CONFIG_HELP}"""


_PATHS = ("workdir", "config", "ref", "input", "output", "out", "data")  # options with a path; --guide may be several

_PATHS_IN_CONFIG = ("--config.ref", "--config.guide", "--config.task.data")


class _Parser(argparse.ArgumentParser):
    """Refuses like the rest of the program: one sentence, not the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """Its result has `command`, a function of (workdir or None, options), and `name`, `workdir` and `config`."""
    main = _Parser(
        prog="qsharp", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = main.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(command, summary: str, epilog: str = CONFIG_HELP) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            command.__name__,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=command, name=command.__name__, config=None)
        return sub

    def add_on_run(command, summary: str) -> argparse.ArgumentParser:
        sub = add(command, summary)
        sub.add_argument("--workdir", metavar="DIR", required=True, help="the run's folder; made if it is new")
        _add_config(sub, required=command in (runs.run, runs.compare))
        if command in (runs.run, runs.collect, runs.fit, runs.evaluate):
            _add_processes(sub)
        return sub

    sub = add_on_run(
        runs.run, "everything: reference, the config's algorithm, evaluation, report; resumes when repeated"
    )
    _add_profile(sub)

    add_on_run(runs.compare, "algorithms side by side at equal budgets, each in a workdir below; resumes when repeated")

    sub = add_on_run(runs.collect, "collect one round's rollouts: roll in guided, finish with the reference, judge")
    sub.add_argument("--round", type=_whole(1), metavar="K", help="from 1; by default the one after the last fitted")

    sub = add_on_run(runs.fit, "fit the guide to all rollouts up to a round")
    sub.add_argument("--round", type=_whole(1), metavar="K", help="from 1; by default the last collected")
    sub.add_argument("--skip-damaged", action="store_true", help="leave out damaged shards, naming each")
    _add_profile(sub)

    sub = add(
        texts.generate,
        "answer prompts with the guided model; JSON lines to standard output, or to a file; resumes",
        f"{GENERATE_HELP}\n\n{CONFIG_HELP}",
    )
    _add_generate(sub)

    sub = add(texts.score, "log-probabilities and values of given responses; JSON lines; resumes", SCORE_HELP)
    _add_folders(sub)
    sub.add_argument("--input", metavar="FILE", required=True, help="JSON lines, as described below")
    sub.add_argument("--output", metavar="FILE", required=True, help="where the JSON lines go")
    sub.add_argument(
        "--batch-size", type=_whole(1), default=texts.BATCH_ROWS, metavar="N",
        help=f"sequences in a batch, by default {texts.BATCH_ROWS}",
    )  # fmt: skip

    sub = add(texts.judge, "rewards of given responses, without a model; JSON lines", JUDGE_HELP)
    sub.set_defaults(workdir=None)
    sub.add_argument("--task", metavar="NAME", required=True, help="the task that they respond to, such as gsm8k")
    sub.add_argument("--input", metavar="FILE", required=True, help="JSON lines, as described below")
    sub.add_argument("--output", metavar="FILE", required=True, help="where the JSON lines go")
    sub.add_argument(
        "--data", metavar="DIR", default="",
        help="where a problem_id is looked up: a folder of the data set's files, or hub; by default the folder that"
        " QSHARP_DATA names, else the hub",
    )  # fmt: skip

    sub = add_on_run(runs.evaluate, "measure the reference, Q# and CD on held-out problems; writes results.json")
    sub.add_argument(
        "--rejudge", action="store_true",
        help="judge the samples that are there again, without a model, and write their files and results.json anew",
    )  # fmt: skip
    add_on_run(runs.report, "write report.md, the plots and examples.html from what was measured")

    sub = add(runs.plan, "memory and time on a mesh of devices, without a device", PLAN_HELP)
    _add_config(sub, required=True)
    sub.set_defaults(workdir=None)
    sub.add_argument("--ref-size", metavar="SIZE", help="a published shape as the reference, such as llama3.1-70b")
    sub.add_argument("--guide-size", metavar="SIZE", help="the same as the guide, such as llama3.2-3b")
    sub.add_argument(
        "--prompt-tokens", type=_whole(1), metavar="N",
        help="of the longest prompt; by default config.generate.prompt_bucket",
    )  # fmt: skip
    sub.add_argument(
        "--compile", action="store_true",
        help="ask the TPU compiler as well, for a TPU's mesh (minutes); it comes with: pip install \".[tpu]\"",
    )  # fmt: skip

    sub = add_on_run(runs.export, "write one of a run's models as a folder that `transformers` loads")
    sub.add_argument(
        "--what", choices=("ref", "guide"), required=True, help="the reference, or the last guide or policy"
    )
    sub.add_argument("--out", metavar="DIR", required=True, help="the folder; made if it is new, must be empty if not")
    return main


def paths(options: argparse.Namespace, rest: Sequence[str]) -> list[tuple[str, str]]:
    """The files and folders that the user named: options, and paths; `rest` is what changes the config."""
    named = [(f"--{name}", getattr(options, name, None)) for name in _PATHS]
    guides = getattr(options, "guide", None)
    named += [("--guide", guide) for guide in ([guides] if isinstance(guides, str) else guides or [])]
    changes = [word.split("=", 1) for word in rest if "=" in word]
    named += [(name, path) for name, path in changes if name in _PATHS_IN_CONFIG]
    named.append(("QSHARP_DATA", os.environ.get("QSHARP_DATA")))
    return [(name, path) for name, path in named if path]


def _add_config(sub: argparse.ArgumentParser, *, required: bool = False) -> None:
    sub.add_argument(
        "--config", metavar="FILE", required=required, help="a Python file with get_config(), as in configs/"
    )


def _add_processes(sub: argparse.ArgumentParser) -> None:
    several = sub.add_argument_group(
        "several processes, one a host", "all of them run the same command on a workdir that all of them see"
    )
    several.add_argument(
        "--coordinator", metavar="PLACE",
        help="where they meet: HOST:PORT of the first of them, tpu (by the TPU VM's metadata), or slurm (under srun)",
    )  # fmt: skip
    several.add_argument("--processes", type=_whole(1), metavar="N", help="how many, with HOST:PORT")
    several.add_argument("--process", type=_whole(0), metavar="I", help="which this is, from 0, with HOST:PORT")
    several.add_argument(
        "--coordinator-timeout", type=_whole(1), default=300, metavar="SECONDS",
        help="how long they wait for each other at the start, by default 300",
    )  # fmt: skip


def _add_profile(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--profile", action="store_true",
        help="write a trace of ten steps of every training, once it compiles no more, to the workdir's profile/",
    )  # fmt: skip


def _add_folders(sub: argparse.ArgumentParser, *, several_guides: bool = False) -> None:
    sub.add_argument("--workdir", metavar="DIR", help="a run's folder: its reference and its last guide")
    sub.add_argument("--ref", metavar="DIR", help="folder of the reference model")
    if several_guides:
        sub.add_argument(
            "--guide", metavar="DIR", action="append",
            help="folder of the guide; may be given several times, with --weights: their tilts are then multiplied",
        )  # fmt: skip
    else:
        sub.add_argument("--guide", metavar="DIR", help="folder of the guide")
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="of weights and computation; by default bfloat16 for a folder whose config.json says so, else float32",
    )  # fmt: skip
    sub.add_argument(
        "--prompt-format", choices=("plain", "chat"),
        help="the prompt as it is, or as one turn in the tokenizer's chat template; by default plain",
    )  # fmt: skip
    sub.add_argument(
        "--date", type=_date, metavar="YYYY-MM-DD",
        help="what a chat template that writes the date takes for today; by default today, and for a run the day that"
        " it was begun on",
    )  # fmt: skip


def _add_generate(sub: argparse.ArgumentParser) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Sampling)}
    sub.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; or use --input")
    _add_folders(sub, several_guides=True)
    sub.add_argument(
        "--weights", type=_numbers, metavar="LIST",
        help="of several guides, as 0.7,0.3: what each one's logarithm of the tilt is multiplied by",
    )  # fmt: skip
    _add_config(sub)
    sub.add_argument(
        "--input", metavar="FILE", help='a prompt a line, or (.jsonl) JSON lines with a "prompt"; - is standard input'
    )
    sub.add_argument("--output", metavar="FILE", help="where the JSON lines are appended, by default standard output")
    sub.add_argument(
        "--stream", action="store_true", help="print the text of one response to one prompt as it comes, without JSON"
    )
    sub.add_argument(
        "--eta", type=_etas, metavar="LIST",
        help="weights of the KL, as 0.5,0.1: small is strong guidance, inf is the reference alone (eta null in the"
        f" output); by default the run's collect.eta; on folders {texts.ETA} with a guide, inf without",
    )  # fmt: skip
    sub.add_argument("--samples", type=_whole(1), default=1, metavar="N", help="responses to each prompt at each eta")
    sub.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="the same seed gives the same responses")

    def default(name: str) -> str:
        return f"by default the run's; on folders {defaults[name]}"

    sub.add_argument("--temperature", type=float, metavar="T", help=f"0 is greedy; {default('temperature')}")
    sub.add_argument("--top-p", type=float, metavar="P", help=f"in (0, 1]; {default('top_p')}")
    sub.add_argument("--top-k", type=int, metavar="K", help=f"0 for no limit; {default('top_k')}")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help=default("max_new_tokens"))
    sub.add_argument(
        "--top-k-candidates", type=int, metavar="K",
        help=f"how many of the likeliest tokens the guide scores at each step; {default('top_k_candidates')}",
    )  # fmt: skip
    sub.add_argument(
        "--others", choices=OTHERS,
        help="log-weight of the tokens that the guide does not score: mass, so that the scored ones keep their mass"
        " under the reference; prefix, the guide's own of the text so far; or zero, that of reward 0, as in the paper's"
        f" program; {default('others')}",
    )  # fmt: skip
    sub.add_argument(
        "--stop-ids", type=_ids, metavar="LIST",
        help="a response ends at the first of these token ids, as 2,107; by default those of generation_config.json,"
        " the tokenizer's eos and the end of a turn in its chat template",
    )  # fmt: skip
    sub.add_argument(
        "--mode", choices=MODES,
        help="how values tilt: log E exp(z/eta), E z/eta, or log E z; by default as the run's algorithm does,"
        " and qsharp for folders",
    )  # fmt: skip


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least {least}")
        return int(text)

    return parse


def _date(text: str) -> datetime.date:
    try:
        date = datetime.date.fromisoformat(text)
    except ValueError:
        date = None
    if date is None or date.isoformat() != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date, as 2026-01-31")
    return date


def _ids(text: str) -> list[int]:
    if not all(item.strip().isdecimal() for item in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids, as 2,107")
    return [int(item) for item in text.split(",")]


def _numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, as 0.5,0.1") from None


def _etas(text: str) -> list[float]:
    etas = _numbers(text)
    if not all(eta >= LEAST_ETA for eta in etas):
        raise argparse.ArgumentTypeError(f"{text!r}: every eta must be at least {LEAST_ETA:g}")
    return etas
