"""The commands that read and write texts: `generate` and `score`, with a run's models or with models in folders, and
`judge`, which needs none.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qsharp_jax.run.config import trains_policy
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import Sampling
from qsharp_jax.system import files
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.settings import check

ETA = 0.1  # with a guide in a folder, as in the paper's experiments
BATCH_ROWS = 16

OPTIONS = ("temperature", "top_p", "top_k", "max_new_tokens", "top_k_candidates", "others")  # fields of `Sampling`


def generate(workdir: Workdir | None, options: argparse.Namespace) -> None:
    """Every prompt with every eta, as JSON lines, or one as text while it comes."""
    import numpy as np

    changes = _changes(options)
    prompts = _read_prompts(options)
    etas = _etas(workdir, options)
    if options.stream and (len(prompts), len(etas), options.samples, options.output) != (1, 1, 1, None):
        raise UserError("--stream prints one response: give one prompt, one eta, --samples 1, and no --output")
    models = _models(workdir, options)
    guided = not all(map(math.isinf, etas))
    sampling = dataclasses.replace(
        _sampling(models, workdir, changes),
        weights=options.weights if guided else None,
        mode=options.mode or _mode(workdir),
    )
    encoded = _encode(models, prompts, sampling.max_new_tokens, guided)
    if options.output:
        _check_output(options.output)
    plan = [(row, eta) for row in range(len(prompts)) for eta in etas for _ in range(options.samples)]
    seeds = np.random.SeedSequence(options.seed).generate_state(len(plan))
    rows = min(len(plan), BATCH_ROWS if workdir is None else workdir.config.evaluate.batch_size)
    names = list(models.configs) if guided else ["reference"]

    from qsharp_jax.cli import generate_file

    requests = [
        generate_file.Request(prompts[row], eta if math.isfinite(eta) else None, int(seed))
        for (row, eta), seed in zip(plan, seeds, strict=True)
    ]
    described = _described(models, workdir, options, names, sampling)

    @functools.cache
    def load() -> tuple:
        _check_memory(models, names, rows, max(map(len, encoded)), sampling)
        return models.load_ref(), models.load_guide() if guided else None

    if options.stream:
        _stream(models.tokenizer, *load(), encoded, dataclasses.replace(sampling, eta=etas[0]), seeds)
        return

    def lines(places: Sequence[int]) -> Iterator[tuple[int, str]]:
        """The lines of some responses, as they end, and the places of these."""
        from qsharp_jax.generate import ContinuousBatch
        from qsharp_jax.system.progress import Bar

        batch = ContinuousBatch(  # of all prompts, whatever is missing, so that the programs are the same
            *load(), encoded, dataclasses.replace(sampling, eta=np.asarray([eta for _, eta in plan], np.float32)),
            samples=len(plan) // len(prompts), rows=rows, rng=seeds, starts=((place, ()) for place in places),
        )  # fmt: skip
        hidden = not sys.stderr.isatty() or (options.output is None and sys.stdout.isatty())
        with Bar(None, "generate", total=len(plan), initial=len(plan) - len(places), disable=hidden) as bar:
            for ended, part in batch:
                for row, place in enumerate(ended.tolist()):
                    text = models.tokenizer.decode(part.response(row))
                    yield place, generate_file.encode(requests[place], text, part, row, described)
                bar.update(len(ended))

    if options.output and Path(options.output).is_file():
        each = len(plan) // len(prompts)

        def by_length(places: Sequence[int]) -> Iterator[tuple[int, str]]:  # those are prefilled together
            return lines(sorted(places, key=lambda place: len(encoded[place // each])))

        if generate_file.write(Path(options.output), requests, described, by_length) == len(plan):
            print(f"{options.output} is complete: all {len(plan)} responses are there", file=sys.stderr)
        return
    # Standard output, a pipe or /dev/null: what is there is not kept.
    load()  # what is refused is refused before the output is opened
    output = open(options.output, "w", encoding="utf-8") if options.output else _standard_output()
    with files.named(options.output or "standard output"), output as file:
        for line in generate_file.in_order(lines(range(len(plan)))):
            file.write(line)
            file.flush()


def _described(
    models, workdir: Workdir | None, options: argparse.Namespace, names: Sequence[str], sampling: Sampling
) -> dict[str, Any]:
    """Describe how a line was generated: all that the responses depend on but prompt and eta, as JSON has it.

    Args:
      names: of the models that run.
    """
    if workdir is None:
        source = {"ref": options.ref, "guide": options.guide, "prompt_format": options.prompt_format or "plain"}
        if models.tokenizer.writes_date:
            source["date"] = models.tokenizer.date.isoformat()
    else:
        from qsharp_jax.run.models import fitted_rounds

        source = {"workdir": str(workdir.path), "round": fitted_rounds(workdir) if "guide" in names else 0}
    dtype = {name: models.configs[name].dtype for name in names}
    settings = {name: getattr(sampling, name) for name in (*OPTIONS, "stop_ids")}
    settings["weights"] = None if sampling.weights is None else sampling.weights.tolist()
    settings["mode"] = sampling.mode
    return json.loads(json.dumps(source | {"dtype": dtype, "seed": options.seed} | settings))


def _stream(text, ref, guide, encoded: list[list[int]], sampling: Sampling, seeds: Sequence[int]) -> None:
    from qsharp_jax.generate import stream

    blocks = stream(ref, guide, encoded, sampling, rng=seeds, record=())
    with _standard_output() as file:
        for piece in text.decode_stream(rows[0] for rows in blocks):
            file.write(piece)
            file.flush()
        file.write("\n")


def score(workdir: Workdir | None, options: argparse.Namespace) -> None:
    """The reference's log-probabilities and the guide's values of given responses, as JSON lines."""
    import functools

    from qsharp_jax.cli import score_file

    if workdir is not None and trains_policy(workdir.config):
        raise UserError(
            f"{workdir.path} holds a policy trained by {workdir.config.algorithm}, which gives no values; score with"
            " models' folders, by --ref and --guide"
        )
    records = score_file.read(options.input)
    _check_other_file(options)
    has_ref, has_guide = (bool(workdir or folder) for folder in (options.ref, options.guide))
    done = score_file.resume(options.output, records, ["ref_log_probs"] * has_ref + ["values", "value"] * has_guide)
    records = records[done:]
    if not records:
        print(f"{options.output} is complete: all {done} records are scored", file=sys.stderr)
        return

    from qsharp_jax.evaluation import score as scoring
    from qsharp_jax.models import memory

    models = _models(workdir, options)
    positions = min(config.max_positions for config in models.configs.values())
    examples = score_file.encode(records, models.tokenizer, positions, first=done + 1)
    _check_output(options.output)
    memory.check_memory({f"the {name}'s weights": models.weights[name] for name in models.configs})
    vocab_size, rows = models.tokenizer.vocab_size, options.batch_size
    log_probs = means = None
    if has_ref:
        log_probs = functools.partial(scoring.log_probs, models.load_ref(), rows=rows, vocab_size=vocab_size)
    if has_guide:
        means = functools.partial(scoring.score, models.load_guide(), rows=rows)
    score_file.write(options.output, records, examples, log_probs=log_probs, means=means, rows=rows)


def judge(workdir: None, options: argparse.Namespace) -> None:
    """The rewards of given responses, as JSON lines."""
    from qsharp_jax.cli import judge_file
    from qsharp_jax.tasks import registry

    try:
        task = registry.get(options.task)
    except ValueError as error:
        raise UserError(str(error)) from None
    records, problems = judge_file.read(options.input, task, options.data)
    _check_other_file(options)
    _check_output(options.output)
    judgements = judge_file.judge(task, records, problems)
    judge_file.write(options.output, records, judgements)
    print(f"{options.output}: {judge_file.summary(problems, judgements)}", file=sys.stderr)


# --- Where the models come from -------------------------------------------------------------------------------------


def check_source(options: argparse.Namespace) -> None:
    """That the arguments name either a run or folders, and those that the command needs."""
    folders = [f"--{name}" for name in ("ref", "guide") if getattr(options, name) is not None]
    if options.workdir is not None and folders:
        raise UserError(f"give a run by --workdir, or models' folders by {' and '.join(folders)}, not both")
    if options.workdir is None and not folders:
        raise UserError("there are no models; give a run by --workdir, or models' folders by --ref and --guide")
    if options.name == "generate" and folders == ["--guide"]:
        raise UserError("--guide needs the reference that it guides; give --ref")
    if (guides := len(_guides(options))) > 1 or getattr(options, "weights", None):
        given = len(options.weights or [])
        if guides < 2 or guides != given:
            raise UserError(
                f"there are {guides} --guide and {given} --weights; to compose guides give each by a --guide of its"
                " own, and as many --weights, as 0.7,0.3"
            )
    for name in ("dtype", "prompt_format", "stop_ids", "date"):
        if options.workdir is not None and getattr(options, name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --ref; a run's models keep their own")


def _mode(workdir: Workdir | None) -> str:
    """How the algorithm of a run tilts; a policy is sampled as it is."""
    if workdir is None:
        return "qsharp"
    from qsharp_jax import algorithms

    algorithm = algorithms.get(workdir.config.get("algorithm", "qsharp"))
    return algorithm.mode(workdir.config) if hasattr(algorithm, "mode") else "qsharp"


def _models(workdir: Workdir | None, options: argparse.Namespace):
    """`RunModels` or `Folders`: both have `tokenizer`, `configs`, `load_ref` and `load_guide`."""
    if workdir is not None:
        from qsharp_jax.run.models import RunModels
        from qsharp_jax.run.session import Session

        return RunModels(Session(workdir))
    from qsharp_jax.run.folders import Folders

    return Folders(
        options.ref and Path(options.ref),
        _guides(options),
        dtype=options.dtype,
        prompt_format=options.prompt_format or "plain",
        stop_ids=getattr(options, "stop_ids", None),
        date=options.date,
    )


def _guides(options: argparse.Namespace) -> list[Path]:
    """Of `generate` several may be given."""
    return [Path(guide) for guide in ([options.guide] if isinstance(options.guide, str) else options.guide or [])]


# --- What `generate` is given ---------------------------------------------------------------------------------------


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of `Sampling` that the arguments set."""
    rules = {field.name: field.metadata["rule"] for field in dataclasses.fields(Sampling)}
    changes = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    for name, value in changes.items():
        check(f"--{name.replace('_', '-')}", value, rules[name])
    return changes


def _sampling(models, workdir: Workdir | None, changes: dict[str, Any]) -> Sampling:
    """The run's settings or the defaults, with the changes by the arguments; without eta, weights and mode."""
    vocab_size = models.tokenizer.vocab_size
    if changes.get("top_k_candidates", 0) > vocab_size:
        raise UserError(
            f"--top-k-candidates is {changes['top_k_candidates']}; it must be at most {vocab_size}, the vocabulary's"
            " size"
        )
    if workdir is not None:
        return dataclasses.replace(models.sampling, **changes)
    sampling = Sampling(stop_ids=models.tokenizer.stop_ids, vocab_size=vocab_size)
    candidates = min(sampling.top_k_candidates, vocab_size)
    return dataclasses.replace(sampling, **{"top_k_candidates": candidates} | changes)


def _etas(workdir: Workdir | None, options: argparse.Namespace) -> list[float]:
    if workdir is not None:
        return options.eta or [workdir.config.collect.eta]
    if options.guide:
        return options.eta or [ETA]
    for eta in options.eta or []:
        if math.isfinite(eta):
            raise UserError(f"--eta {eta:g} needs a guide; give --guide, or leave --eta out")
    return options.eta or [math.inf]


def _encode(models, prompts: list[str], max_new_tokens: int, guided: bool) -> list[list[int]]:
    """The prompts' ids; one that is too long for a model that runs is refused before any weight is read."""
    encoded = [models.tokenizer.encode_prompt(prompt) for prompt in prompts]
    limits = {what: config.max_positions for what, config in models.configs.items() if guided or what == "reference"}
    what, limit = min(limits.items(), key=lambda item: item[1])
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens:
            raise UserError(f"the prompt {prompt[:60]!r} has no tokens; write at least one word")
        if len(tokens) + max_new_tokens > limit:
            raise UserError(
                f"the prompt {prompt[:60]!r} has {len(tokens)} tokens, which with {max_new_tokens} new ones is more"
                f" than the {what}'s {limit} positions; shorten the prompt, or give a smaller --max-new-tokens"
            )
    return encoded


def _check_memory(models, names: Sequence[str], rows: int, longest: int, sampling: Sampling) -> None:
    """That the weights and the caches of the models that run fit, before any weight is read.

    Args:
      rows: of a batch.
      longest: tokens of the longest prompt.
    """
    from qsharp_jax.generate import cache_size, caches
    from qsharp_jax.models import memory

    size = cache_size(longest, sampling.max_new_tokens, sampling.prompt_bucket)
    weights = {f"the {name}'s weights": models.weights[name] for name in names}
    memory.check_memory(weights | caches({name: models.configs[name] for name in names}, rows, size))


def _check_other_file(options: argparse.Namespace) -> None:
    if Path(options.output).exists() and os.path.samefile(options.input, options.output):
        raise UserError(f"{options.output} is the input itself; give another --output")


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
            prompt.encode()  # half a surrogate pair is in no text
        except (ValueError, KeyError, TypeError, AttributeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'{name}, line {number}: expected a JSON object with a text as its "prompt"')
        prompts.append(prompt)
    return prompts


def _standard_output():
    return os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
