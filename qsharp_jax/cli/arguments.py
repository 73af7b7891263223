"""Arguments that several commands share, and how their values are read."""

import argparse
import datetime
from collections.abc import Callable

CONFIG_HELP = """\
Settings: any value of the config can be changed by --config.KEY=VALUE, for example --config.seed=1 or
--config.collect.samples=8. A workdir remembers its settings, so later commands need only --workdir. To use a model
instead of pre-training: --config.ref=MODEL, and --config.guide=MODEL for what the guide starts from. A MODEL is a
folder as saved by `transformers`, a GGUF file, or an id on the Hugging Face hub (OWNER/NAME or OWNER/NAME@REVISION)."""

MODELS_HELP = """\
Models: those of a run, by --workdir, or others, by --ref and --guide: a folder with config.json, safetensors and
tokenizer files, as written by `transformers` and `qsharp export`; a GGUF file, or a folder with one; or an id on the
Hugging Face hub, OWNER/NAME or OWNER/NAME@REVISION, downloaded at first use. The guide's tokenizer must have the
reference's entries, except for special tokens that neither model uses; the embeddings may be padded to different
sizes."""


def add_workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", metavar="DIR", required=True, help="the run's folder; created if it is new")


def add_config(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--config", metavar="RECIPE", required=required,
        help="a recipe by name, such as arithmetic, or a Python file with get_config()",
    )  # fmt: skip


def add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes, one per host",
        "all of them run the same command, with a workdir or models' folders that all of them see",
    )
    group.add_argument(
        "--coordinator", metavar="PLACE",
        help="where they meet: HOST:PORT of the first process, tpu (by the TPU VM's metadata), or slurm (under srun)",
    )  # fmt: skip
    group.add_argument("--processes", type=whole(1), metavar="N", help="number of processes, with HOST:PORT")
    group.add_argument("--process", type=whole(0), metavar="I", help="index of this process, from 0, with HOST:PORT")
    group.add_argument(
        "--coordinator-timeout", type=whole(1), default=300, metavar="SECONDS",
        help="how long they wait for each other at the start (default: 300)",
    )  # fmt: skip


def add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", action="store_true",
        help="write a trace of ten steps of every training, after compilation, to the workdir's profile/",
    )  # fmt: skip


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add models of a run or in folders; the command adds --guide itself, since some take several."""
    parser.add_argument("--workdir", metavar="DIR", help="a run's folder: its reference and its last guide")
    parser.add_argument("--ref", metavar="MODEL", help="the reference: a folder, a GGUF file, or an id on the hub")
    parser.add_argument(
        "--mesh", metavar="NAME",
        help="divide the models over the devices, by a preset of configs/meshes.py such as cuda_8 or v5e_16;"
        " --config.mesh.KEY=VALUE changes its numbers (default: one device; a run has its own mesh)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="dtype of weights and computation (default: bfloat16 if the model is stored so, else float32)",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", choices=("int8", "int4"),
        help="weights in 8 bits, one scale per output channel, or mostly in 4, one per 128 inputs (or 32), and keys and"
        " values in 8: reference and guide are then these models (default: all in --dtype)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-format", choices=("plain", "chat"),
        help="the prompt as it is, or in the tokenizer's chat template (default: chat, if there is a template)",
    )  # fmt: skip
    parser.add_argument(
        "--date", type=date, metavar="YYYY-MM-DD",
        help="today's date for a chat template that writes it (default: today; for a run, the day it began)",
    )  # fmt: skip


def whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least {least}")
        return int(text)

    return parse


def date(text: str) -> datetime.date:
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError:
        day = None
    if day is None or day.isoformat() != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2026-01-31")
    return day


def ids(text: str) -> list[int]:
    if not all(item.strip().isdecimal() for item in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 2,107")
    return [int(item) for item in text.split(",")]


def numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,0.1") from None
