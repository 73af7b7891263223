"""`qsharp generate`: answer prompts with the guided model."""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qsharp_jax.cli import arguments, json_lines
from qsharp_jax.cli.models import check_source, is_first, of_first, on_mesh, open_models
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import DEFAULT_ETA, ETA, MODES, OTHERS, WEIGHT, Sampling
from qsharp_jax.system import chat, files, settings, stop_strings
from qsharp_jax.system.chat import Prompt
from qsharp_jax.system.errors import UserError

SUMMARY = "answer prompts with the guided model; JSON lines to standard output, or to a file; resumes"
EPILOG = f"""\
A line of the output is a JSON object with the "prompt", the "response" and its "tokens", whether it "finished" (by a
stop token or a stop string), its "eta" and "seed", per token "log_probs", "ref_log_probs", "kl" and "values" (null
where there is none), and the "settings" that all lines share. Standard output has them in the order of the prompts.
--output gets each line as its response ends, and is sorted by prompt at the end. The same command, repeated after it
stopped, appends what is missing; prompts may be added at the end of the input. A file made with other models or
settings is refused.

With --stop a response ends at the first token with which its text contains a stop string. The "response" is the text
before the stop string; "tokens" and the numbers per token go up to that token, whose text may reach beyond it.

A line of a .jsonl input has a "prompt": a text, or a list of messages, [{{"role": "user", "content": "..."}}], of the
roles system, user and assistant. Its other columns are copied to the lines of its responses; one that has the name of
a column of the output is refused.

{arguments.MODELS_HELP}

{arguments.CONFIG_HELP}"""

FIELDS = {field.name: field for field in dataclasses.fields(Sampling)}
TYPES = {
    "temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int, "top_k_candidates": int, "others": str
}  # fmt: skip
METAVARS = {int: "N", float: "X", str: None}  # None: the choices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; or use --input")
    arguments.add_models(parser)
    parser.add_argument(
        "--guide", metavar="MODEL", action="append",
        help="the guide: a folder, or an id on the hub; may be given several times, with --weights: their tilts are"
        " then multiplied",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=arguments.numbers, metavar="LIST",
        help="what each guide's log-weights are multiplied by, such as 0.7,0.3; of one guide the power of its tilt",
    )  # fmt: skip
    arguments.add_config(parser)
    arguments.add_processes(parser)
    parser.add_argument(
        "--input", metavar="FILE",
        help='a prompt per line, or (.jsonl) JSON lines with a "prompt", a text or a list of messages; - is standard'
        " input",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="a system prompt before every prompt, in the chat template")
    parser.add_argument("--output", metavar="FILE", help="where the JSON lines go (default: standard output)")
    parser.add_argument(
        "--stream", action="store_true", help="print the text of one response to one prompt as it comes, without JSON"
    )
    parser.add_argument(
        "--eta", type=_etas, metavar="LIST",
        help="weights of the KL, such as 0.5,0.1: small is strong guidance, inf is the reference alone (eta null in the"
        f" output) (default: the run's collect.eta; for folders {DEFAULT_ETA} with a guide, inf without)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=arguments.whole(1), default=1, metavar="N", help="responses per prompt and eta (default: 1)"
    )
    parser.add_argument(
        "--seed", type=arguments.whole(0), default=0, metavar="N", help="equal seeds give equal responses (default: 0)"
    )
    parser.add_argument(
        "--batch-size", type=arguments.whole(1), metavar="N",
        help="responses decoded at once; in float32 they do not depend on it (default: the run's evaluate.batch_size;"
        " for folders as many as fit into memory, at most 64 on a CPU, else 256)",
    )  # fmt: skip
    for name, kind in TYPES.items():
        field = FIELDS[name]
        parser.add_argument(
            option(name), type=kind, choices=OTHERS if kind is str else None, metavar=METAVARS[kind],
            help=f"{field.metadata['help']} (default: the run's; for folders {field.default})",
        )  # fmt: skip
    parser.add_argument(
        "--stop-ids", type=arguments.ids, metavar="LIST",
        help="a response ends at the first of these token ids, such as 2,107 (default: those of"
        " generation_config.json, the tokenizer's eos and the end of a turn in its chat template)",
    )  # fmt: skip
    parser.add_argument(
        "--stop", action="append", metavar="TEXT",
        help="a response ends where its text has this, which is cut off with what follows it; may be given several"
        " times; for a line end write $'\\n' in bash (default: the run's; for folders none)",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=MODES,
        help=f"{FIELDS['mode'].metadata['help']} (default: as the run's algorithm does; for folders qsharp)",
    )  # fmt: skip


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(workdir: Workdir | None, options: argparse.Namespace) -> None:
    """Answer every prompt at every eta, as JSON lines, or one prompt as text while it is generated."""
    changes = _changes(options)
    prompts = of_first(_read_prompts(options) if is_first(options) else None, options)
    etas = _default_etas(workdir, options)
    if options.stream and (len(prompts), len(etas), options.samples, options.output) != (1, 1, 1, None):
        raise UserError("--stream prints one response: give one prompt, one eta, --samples 1, and no --output")
    models = open_models(workdir, options)
    with on_mesh(models):
        _answer(workdir, options, models, prompts, etas, changes)


def _answer(
    workdir: Workdir | None,
    options: argparse.Namespace,
    models: Any,
    prompts: Sequence[tuple[Prompt, dict[str, Any]]],
    etas: Sequence[float],
    changes: dict[str, Any],
) -> None:
    """Generate and write the responses; `changes` are those of the sampling."""
    import numpy as np

    from qsharp_jax.cli import generated

    guided = not all(map(math.isinf, etas))
    sampling = dataclasses.replace(
        _sampling(models, workdir, changes),
        weights=options.weights if guided else None,
        mode=options.mode or mode_of(workdir),
    )
    if options.system is not None and models.tokenizer.prompt_format == "plain":
        raise UserError("--system is a message of a chat, and the prompt format is plain; leave --system out")
    texts = [prompt if options.system is None else chat.with_system(prompt, options.system) for prompt, _ in prompts]
    encoded = _encode(models, texts, sampling.max_new_tokens, guided)
    if options.output and is_first(options):
        if options.input and options.input != "-":
            json_lines.check_other_file(options.output, options.input)
        json_lines.check_output(options.output)
    plan = [(row, eta) for row in range(len(prompts)) for eta in etas for _ in range(options.samples)]
    per_prompt = len(plan) // len(prompts)
    seeds = np.random.SeedSequence(options.seed).generate_state(len(plan))
    names = list(models.configs) if guided else ["reference"]
    most = options.batch_size or _rows(workdir, models, names, max(map(len, encoded)), sampling)
    rows = min(len(plan), of_first(most, options))
    requests = [
        generated.Request(*prompts[row], eta if math.isfinite(eta) else None, int(seed))
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
        """Yield the lines of the first process's places as their responses end, each with its place."""
        from qsharp_jax.decoding import ContinuousBatch
        from qsharp_jax.system.progress import Bar

        if not (places := of_first([*places], options)):
            return
        batch = ContinuousBatch(  # of all prompts, whatever is missing, so that the compiled programs are the same
            *load(), encoded, dataclasses.replace(sampling, eta=np.asarray([eta for _, eta in plan], np.float32)),
            samples=per_prompt, rows=rows, rng=seeds, order=places,
            tokenizer=models.tokenizer,
        )  # fmt: skip
        hidden = not sys.stderr.isatty() or (options.output is None and sys.stdout.isatty())
        with Bar(None, "generate", total=len(plan), initial=len(plan) - len(places), disable=hidden) as bar:
            for ended, part in batch:
                for row, place in enumerate(ended.tolist()):
                    text = stop_strings.cut(models.tokenizer.decode(part.response(row)), sampling.stop)
                    yield place, generated.encode(requests[place], text, part, row, described)
                bar.update(len(ended))

    if not is_first(options):  # it computes with the first, which writes
        collections.deque(lines(()), maxlen=0)
        return
    if options.output and Path(options.output).is_file():

        def by_length(places: Sequence[int]) -> Iterator[tuple[int, str]]:  # prompts of equal length share a prefill
            return lines(sorted(places, key=lambda place: len(encoded[place // per_prompt])))

        if generated.write(Path(options.output), requests, described, by_length) == len(plan):
            print(f"{options.output} is complete: all {len(plan)} responses are there", file=sys.stderr)
        return
    # Standard output, a pipe or /dev/null, which cannot be resumed.
    load()  # errors come before the output is opened
    output = open(options.output, "w", encoding="utf-8") if options.output else _standard_output()
    with files.named(options.output or "standard output"), output as file:
        for line in generated.in_order(lines(range(len(plan)))):
            file.write(line)
            file.flush()


def check_arguments(options: argparse.Namespace) -> None:
    """Raise a UserError for arguments that do not go together, before a workdir is opened."""
    check_source(options)
    guides, weights = len(options.guide or []), len(options.weights or [])
    for weight in options.weights or []:
        settings.check("--weights", weight, WEIGHT)
    if guides and options.ref is None:
        raise UserError("--guide needs the reference that it guides; give --ref")
    guides = 1 if options.workdir is not None else guides
    if (guides > 1 or weights) and guides != weights:
        raise UserError(
            f"the guides are {guides} and the --weights {weights}; give one weight for each guide, such as 0.7,0.3"
        )


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `Sampling` that the arguments set."""
    changes = {name: value for name in (*TYPES, "stop") if (value := getattr(options, name)) is not None}
    for name, value in changes.items():
        settings.check(option(name), value, FIELDS[name].metadata["rule"])
    return changes


def _sampling(models: Any, workdir: Workdir | None, changes: dict[str, Any]) -> Sampling:
    """Return the run's settings or the defaults, changed by the arguments; without eta, weights and mode."""
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


def mode_of(workdir: Workdir | None) -> str:
    """Return the guidance mode of a run's algorithm; it has no effect on a policy."""
    if workdir is None:
        return "qsharp"
    from qsharp_jax.algorithms.registry import ALGORITHMS

    return ALGORITHMS[workdir.config.algorithm].mode(workdir.config) or "qsharp"


def _default_etas(workdir: Workdir | None, options: argparse.Namespace) -> list[float]:
    if workdir is not None:
        return options.eta or [workdir.config.collect.eta]
    if options.guide:
        return options.eta or [DEFAULT_ETA]
    for eta in options.eta or []:
        if math.isfinite(eta):
            raise UserError(f"--eta {eta:g} needs a guide; give --guide, or leave --eta out")
    return options.eta or [math.inf]


def _read_prompts(options: argparse.Namespace) -> list[tuple[Prompt, dict[str, Any]]]:
    """Read the prompts, each with its other columns, from the arguments, or from the file or standard input."""
    if options.prompts and options.input:
        raise UserError("give prompts as arguments or by --input, not both")
    if options.prompts:
        return [(prompt, {}) for prompt in options.prompts]
    lines = json_lines.read_lines(options.input or "-", "prompts, one per line")
    if not (options.input or "").endswith(".jsonl"):
        return [(line, {}) for _, line in lines]
    return [_parse(place, line) for place, line in lines]


def _parse(place: str, line: str) -> tuple[Prompt, dict[str, Any]]:
    record = json_lines.parse(line, strict=True) or {}
    prompt = record.pop("prompt", None)
    if not isinstance(prompt, str | list):
        raise UserError(f'{place}: expected a JSON object with a text, or a list of messages, as its "prompt"')
    if isinstance(prompt, list):
        chat.check_messages(prompt, place)
    if clashing := [name for name in json_lines.GENERATED if name in record]:
        raise UserError(f"{place}: the output has a column {clashing[0]!r} of its own; rename that of the input")
    return prompt, record


def _encode(models: Any, prompts: list[Prompt], max_new_tokens: int, guided: bool) -> list[list[int]]:
    """Return the prompts' ids; a prompt too long for one of the models is refused before weights are read."""
    encoded = [models.tokenizer.encode_prompt(prompt) for prompt in prompts]
    limits = {name: config.max_positions for name, config in models.configs.items() if guided or name == "reference"}
    name, limit = min(limits.items(), key=lambda item: item[1])
    for prompt, tokens in zip(prompts, encoded, strict=True):
        words = repr(chat.as_text(prompt)[:60])
        if not tokens:
            raise UserError(f"the prompt {words} has no tokens; write at least one word")
        if len(tokens) + max_new_tokens > limit:
            raise UserError(
                f"the prompt {words} has {len(tokens)} tokens, which with {max_new_tokens} new ones is more"
                f" than the {name}'s {limit} positions; shorten the prompt, or give a smaller --max-new-tokens"
            )
    return encoded


def _described(
    models: Any, workdir: Workdir | None, options: argparse.Namespace, names: Sequence[str], sampling: Sampling
) -> dict[str, Any]:
    """Return everything that the responses depend on except prompt and eta, as JSON values.

    Args:
      names: the models that run.
    """
    if workdir is None:
        from qsharp_jax.models.hf import hub

        guides = options.guide and [hub.pin(guide) for guide in options.guide]
        source = {"ref": hub.pin(options.ref), "guide": guides, "prompt_format": models.tokenizer.prompt_format}
        if options.quantize:
            source["quantize"] = options.quantize
        if models.tokenizer.writes_date:
            source["date"] = models.tokenizer.date.isoformat()
    else:
        from qsharp_jax.run.models import fitted_rounds

        source = {"workdir": str(workdir.path), "round": fitted_rounds(workdir) if "guide" in names else 0}
    dtype = {name: models.configs[name].dtype for name in names}
    described = {name: getattr(sampling, name) for name in (*TYPES, "stop_ids", "mode")}
    described |= {"stop": sampling.stop or None, "system": options.system}
    described["weights"] = None if sampling.weights is None else sampling.weights.tolist()
    return json.loads(json.dumps(source | {"dtype": dtype, "seed": options.seed} | described))


def _rows(workdir: Workdir | None, models: Any, names: Sequence[str], longest: int, sampling: Sampling) -> int:
    """Return the number of responses to decode at once, if the user does not say."""
    if workdir is not None:
        return workdir.config.evaluate.batch_size
    from qsharp_jax.decoding import cache_size, dequantized, rows_that_fit

    size = cache_size(longest, sampling.max_new_tokens, sampling.prompt_bucket)
    configs, weights = ({name: of[name] for name in names} for of in (models.configs, models.weights))
    return rows_that_fit([*configs.values()], size, (weights, dequantized(configs, weights)))


def _check_memory(models: Any, names: Sequence[str], rows: int, longest: int, sampling: Sampling) -> None:
    """Check that the weights and caches of the models `names` fit, for `rows` prompts of up to `longest` tokens."""
    from qsharp_jax.decoding import cache_size, caches, dequantized
    from qsharp_jax.models import memory, sharding
    from qsharp_jax.models.kv_cache import Sizes

    size = cache_size(longest, sampling.max_new_tokens, sampling.prompt_bucket)
    configs, weights = ({name: of[name] for name in names} for of in (models.configs, models.weights))
    rings = sharding.abstract_rows(caches(configs, Sizes(sharding.round_rows(rows), size)))
    parts = {f"the {name}'s weights": params for name, params in weights.items()}
    memory.check_memory(parts | rings | dequantized(configs, weights))


def _stream(text, ref, guide, encoded: list[list[int]], sampling: Sampling, seeds: Sequence[int]) -> None:
    from qsharp_jax.decoding import stream

    blocks = stream(ref, guide, encoded, sampling, rng=seeds, record=(), tokenizer=text)
    with _standard_output() as file:
        for piece in text.decode_stream((rows[0] for rows in blocks), sampling.stop):
            file.write(piece)
            file.flush()
        file.write("\n")


def _etas(text: str) -> list[float]:
    etas = arguments.numbers(text)
    if not all(map(ETA.passes, etas)):
        raise argparse.ArgumentTypeError(f"{text!r}: every eta must be {ETA.words}")
    return etas


def _standard_output():
    return os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
