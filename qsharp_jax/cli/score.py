"""`qsharp score`: log-probabilities and values of given responses, written in the order of the input to resume."""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qsharp_jax.cli import arguments, json_lines
from qsharp_jax.cli.models import check_source, is_first, of_first, on_mesh, open_models
from qsharp_jax.run.config import trains_policy
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system import chat, files
from qsharp_jax.system.errors import UserError

if TYPE_CHECKING:  # importing the tokenizers takes a second
    from qsharp_jax.data.batches import Example
    from qsharp_jax.data.tokenizer import Tokenizer

SUMMARY = "log-probabilities and values of given responses; JSON lines; resumes"
EPILOG = f"""\
A line of the input is a JSON object with texts, {{"prompt": ..., "response": ...}}, or with token ids,
{{"prompt_tokens": [...], "response_tokens": [...]}}, which take precedence. A prompt may also be a list of messages,
[{{"role": "user", "content": "..."}}]. A response given as text is scored with the token that ends it: in the chat
format the end of a turn, else eos; to score one without an end, give tokens. The output has the same lines and fields,
with

  prompt_format  plain or chat, for a line with texts: the form in which they were encoded
  ref_log_probs  of every response token given those before it, in nats, under the reference at temperature 1
  values         the guide's mean reward-to-go at every response token
  value          the last of these

The same command, repeated after it stopped, appends what is missing. If the chat template writes the date, give --date
to resume with the same prompts on another day.

{arguments.MODELS_HELP}"""

BATCH_ROWS = 16
SCORES = ("ref_log_probs", "values", "value")
ADDED = ("prompt_format", *SCORES)
SHORTEST = 32  # tokens; batch widths are this times a power of two, so that few programs are compiled
CHUNK = 16  # batches between writes: enough to combine sequences of similar length

# scorer(examples, bucket=width of their batches in tokens) -> one array per response, with a number per response token
Scorer = Callable[..., list[np.ndarray]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_models(parser)
    arguments.add_processes(parser)
    parser.add_argument("--guide", metavar="MODEL", help="the guide: a folder, or an id on the hub")
    parser.add_argument("--input", metavar="FILE", required=True, help="JSON lines, as described below")
    parser.add_argument("--output", metavar="FILE", required=True, help="where the JSON lines go")
    parser.add_argument(
        "--batch-size", type=arguments.whole(1), default=BATCH_ROWS, metavar="N",
        help=f"sequences in a batch (default: {BATCH_ROWS})",
    )  # fmt: skip


check_arguments = check_source


def run(workdir: Workdir | None, options: argparse.Namespace) -> None:
    """Score the responses of a file with the reference, the guide, or both."""
    if workdir is not None and trains_policy(workdir.config):
        raise UserError(
            f"{workdir.path} holds a policy trained by {workdir.config.algorithm}, which gives no values; score with"
            " models' folders, by --ref and --guide"
        )
    records, first = [], is_first(options)
    if first:
        records = read(options.input)
        if options.input != "-":
            json_lines.check_other_file(options.output, options.input)
    has_ref, has_guide = (bool(workdir or folder) for folder in (options.ref, options.guide))
    models = open_models(workdir, options)
    prompt_format = models.tokenizer.prompt_format
    scores = ["ref_log_probs"] * has_ref + ["values", "value"] * has_guide
    done = resume(options.output, records, scores, prompt_format) if first else 0
    records, done = of_first((records[done:], done), options)
    if not records:
        print(f"{options.output} is complete: all {done} records are scored", file=sys.stderr)
        return

    from qsharp_jax.decoding import dequantized
    from qsharp_jax.evaluation import score as scoring
    from qsharp_jax.models import memory

    _warn_of_other_format(records, prompt_format, first=done + 1)
    positions = min(config.max_positions for config in models.configs.values())
    examples = encode(records, models.tokenizer, positions, first=done + 1)
    if first:
        json_lines.check_output(options.output)
    weights = models.weights
    parts = {f"the {name}'s weights": weights[name] for name in models.configs}
    memory.check_memory(parts | dequantized(models.configs, weights))
    vocab_size, rows = models.tokenizer.vocab_size, options.batch_size
    log_probs = means = None
    with on_mesh(models):
        if has_ref:
            log_probs = functools.partial(scoring.log_probs, models.load_ref(), rows=rows, vocab_size=vocab_size)
        if has_guide:
            means = functools.partial(scoring.score, models.load_guide(), rows=rows)
        path = options.output if first else None
        write(path, records, examples, prompt_format=prompt_format, log_probs=log_probs, means=means, rows=rows)


def read(path: str) -> list[dict]:
    """Read a file's records, each with texts or ids of prompt and response; a UserError names a line without."""
    return [_parse(place, line) for place, line in json_lines.read_lines(path, "prompts and responses as JSON lines")]


def _parse(place: str, line: str) -> dict:
    record = json_lines.parse(line, strict=True)
    if record is None or not (_has_tokens(record) or _has_texts(record)):
        raise UserError(
            f'{place}: expected a JSON object with texts "prompt" and "response", or with lists of ids "prompt_tokens"'
            ' and "response_tokens"'
        )
    if isinstance(record.get("prompt"), list) and not _has_tokens(record):
        chat.check_messages(record["prompt"], place)
    # Scores in the input, as in the output of `qsharp generate`, may come from other models.
    return {key: item for key, item in record.items() if key not in ADDED}


def _has_tokens(record: dict) -> bool:
    lists = [record.get(key) for key in ("prompt_tokens", "response_tokens")]
    return all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in lists)


def _has_texts(record: dict) -> bool:
    return isinstance(record.get("prompt"), str | list) and isinstance(record.get("response"), str)


def _warn_of_other_format(records: Sequence[dict], prompt_format: str, *, first: int) -> None:
    """Warn of the first record with texts that `qsharp generate` made from prompts in another format."""
    for number, record in enumerate(records, start=first):
        settings = record.get("settings")
        generated = settings.get("prompt_format", prompt_format) if isinstance(settings, dict) else prompt_format
        if generated != prompt_format and not _has_tokens(record):
            print(
                f"Warning: record {number} was generated with the prompt format {generated}, and is scored with"
                f" {prompt_format}.",
                file=sys.stderr,
            )
            return


def encode(records: Sequence[dict], text: "Tokenizer", positions: int, *, first: int = 1) -> list["Example"]:
    """Encode the records, texts with the token that ends a response.

    Args:
      positions: the models' longest sequence, in tokens.
      first: number of the first record, for messages.

    Raises:
      UserError: naming a record with unknown words or ids, one that is too long, or one with nothing to score.
    """
    from qsharp_jax.data.batches import Example

    examples = []
    for number, record in enumerate(records, start=first):
        if _has_tokens(record):
            prompt, response = record["prompt_tokens"], record["response_tokens"]
        else:
            try:
                prompt, response = text.encode_prompt(record["prompt"]), text.encode_response(record["response"])
            except UserError as error:
                raise UserError(f"record {number}: {error}") from None
        if not prompt or not response:
            raise UserError(
                f"record {number} has no {'response' if prompt else 'prompt'} tokens; it needs at least one"
            )
        if not all(0 <= token < text.vocab_size for token in (*prompt, *response)):
            raise UserError(f"record {number} has token ids outside the vocabulary of {text.vocab_size}")
        if len(prompt) + len(response) > positions:
            raise UserError(
                f"record {number} has {len(prompt)} prompt and {len(response)} response tokens, which is more than the"
                f" model's {positions} positions; shorten it, or leave it out"
            )
        examples.append(Example(prompt, response))
    return examples


def resume(path: str, records: Sequence[dict], scores: Sequence[str], prompt_format: str) -> int:
    """Count the records already in the output, and remove a half line that a kill left.

    Args:
      scores: those of `SCORES` that this command adds.
      prompt_format: in which it encodes texts.

    Raises:
      UserError: if the output, which is then unchanged, does not come from these records.
    """
    data = Path(path).read_bytes() if Path(path).is_file() else b""
    *lines, half = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            stored = json.loads(line)
        except ValueError:
            stored = None
        known = isinstance(stored, dict) and number <= len(records)
        if not known or {key: item for key, item in stored.items() if key not in ADDED} != records[number - 1]:
            raise UserError(
                f"{path}, line {number}, is not of record {number} of the input; give another --output, or delete it"
            )
        if (stored_scores := [key for key in SCORES if key in stored]) != list(scores):
            raise UserError(
                f"{path}, line {number}, has {' and '.join(stored_scores) or 'no scores'}, where this command gives"
                f" {' and '.join(scores)}; give another --output, or the same models as before"
            )
        if not _has_tokens(stored) and stored.get("prompt_format") != prompt_format:
            raise UserError(
                f"{path}, line {number}, was scored with prompt_format {json.dumps(stored.get('prompt_format'))}, and"
                f" this command has {json.dumps(prompt_format)}; give another --output, or the previous settings"
            )
    if half:
        whole = json_lines.dump(records[len(lines)])[:-1].encode() if len(lines) < len(records) else b""
        if not whole or half[: len(whole)] != whole[: len(half)]:
            raise UserError(
                f"{path} ends with a line that is not of record {len(lines) + 1} of the input; give another --output,"
                " or delete it"
            )
        os.truncate(path, len(data) - len(half))
    return len(lines)


def write(
    path: str | None,
    records: Sequence[dict],
    examples: Sequence["Example"],
    *,
    prompt_format: str,
    log_probs: Scorer | None,
    means: Scorer | None,
    rows: int,
) -> None:
    """Append the scored records to the output, in chunks; a scorer of None is skipped.

    Args:
      path: None to compute with another process, which writes.
      prompt_format: in which their texts were encoded.
    """
    from qsharp_jax.system.progress import Bar

    output = contextlib.nullcontext() if path is None else open(path, "a", encoding="utf-8")
    with files.named(path or ""), output as file:
        for begin in Bar(range(0, len(records), rows * CHUNK), "score"):
            part, lines = examples[begin : begin + rows * CHUNK], []
            part_log_probs = log_probs and _by_width(log_probs, part)
            part_means = means and _by_width(means, part)
            for row, record in enumerate(records[begin : begin + rows * CHUNK]):
                if not _has_tokens(record):
                    record = record | {"prompt_format": prompt_format}
                if part_log_probs:
                    record = record | {"ref_log_probs": _numbers(part_log_probs[row])}
                if part_means:
                    values = _numbers(part_means[row])
                    record = record | {"values": values, "value": values[-1]}
                lines.append(json_lines.dump(record) + "\n")
            if file is not None:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())


def _by_width(scorer: Scorer, examples: Sequence["Example"]) -> list[np.ndarray]:
    """Score examples in batches of similar width, and return the scores in the order of the examples."""
    widths = [SHORTEST << max(math.ceil(math.log2(len(example) / SHORTEST)), 0) for example in examples]
    scores: list[np.ndarray] = [np.empty(0)] * len(examples)
    for width in sorted(set(widths)):
        indices = [index for index, other in enumerate(widths) if other == width]
        for index, numbers in zip(indices, scorer([examples[index] for index in indices], bucket=width), strict=True):
            scores[index] = numbers
    return scores


def _numbers(array: np.ndarray) -> list[float | None]:
    """The shortest decimals of these float32, None for what is not finite."""
    return [float(str(x)) if math.isfinite(x) else None for x in np.asarray(array, np.float32)]
