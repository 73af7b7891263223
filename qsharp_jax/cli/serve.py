"""`qsharp serve`: answer requests over HTTP, as OpenAI's API has them."""

import argparse
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from qsharp_jax.cli import arguments
from qsharp_jax.cli.models import check_source, on_mesh, open_models
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.sampling import DEFAULT_ETA, ETA, MODES, OTHERS, Sampling
from qsharp_jax.system.errors import UserError

SUMMARY = "serve models over HTTP, for OpenAI's clients, with a page to try them"
EPILOG = f"""\
  qsharp serve --ref MODEL --guide short=DIR --port 8000

answers POST /v1/chat/completions and /v1/completions as OpenAI's API does. The model "short" is the reference guided at
the default eta; the reference's own name is the reference alone. A request may set eta, guide, weights, mode and top_k
(extra_body in OpenAI's Python client), and with return_guidance gets the KL, the value and the reference's
log-probability of each token. http://127.0.0.1:8000 is a page that shows both answers side by side. docs/serving.md has
it all.

SIGTERM or Ctrl-C ends the server when all requests are answered, with exit code 0; a second one at once.

The API key is read from --api-key-file, or the environment variable QSHARP_API_KEY; without one, none is asked for.

{arguments.MODELS_HELP}"""

CONTEXT = 2048  # tokens, if the models have so many positions
CHUNKS = {"cpu": 64}  # tokens prefilled between two looks at the rows, by platform
CHUNK_ELSEWHERE = 512
ROWS = {"cpu": 16}  # most rows by default, by platform
ROWS_ELSEWHERE = 64
API_KEY = "QSHARP_API_KEY"


class _NamedGuide(argparse.Action):
    """NAME=MODEL, or a MODEL that is called by its last part."""

    def __call__(self, parser: Any, namespace: Any, words: Any, option: Any = None) -> None:
        name, separator, model = words.partition("=")
        if not separator or os.sep in name:
            name, model = Path(words.partition("@")[0]).name, words
        namespace.guide = [*(namespace.guide or []), model]
        namespace.guide_names = [*namespace.guide_names, name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_models(parser)
    parser.set_defaults(guide_names=[])
    parser.add_argument(
        "--guide", metavar="NAME=MODEL", action=_NamedGuide,
        help="a guide, a folder or an id on the hub, and what requests call it; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--name", dest="ref_name", metavar="NAME",
        help="what requests call the reference (default: the last part of its path or id)",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="(default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument(
        "--port", type=arguments.whole(0), default=8000, metavar="N", help="(default: 8000; 0: any that is free)"
    )
    parser.add_argument(
        "--rows", type=arguments.whole(1), metavar="N",
        help=f"responses decoded at once (default: as many as fit into memory, at most {ROWS['cpu']} on a CPU, else"
        f" {ROWS_ELSEWHERE})",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=arguments.whole(2), metavar="N",
        help=f"longest prompt with its response, in tokens (default: {CONTEXT}, or the models' positions if fewer)",
    )  # fmt: skip
    parser.add_argument(
        "--queue", type=arguments.whole(1), default=64, metavar="N",
        help="prompts that may wait for a row; more are refused with status 429 (default: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=arguments.whole(1), default=600, metavar="SECONDS", help="longest answer (default: 600)"
    )
    parser.add_argument(
        "--max-body", type=arguments.whole(1), default=1 << 20, metavar="BYTES",
        help="largest body of a request (default: 1048576)",
    )  # fmt: skip
    parser.add_argument(
        "--eta", type=_eta, metavar="X",
        help=f"weight of the KL where a request does not say (default: {DEFAULT_ETA}, or the run's collect.eta)",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=MODES, help="how values tilt where a request does not say (default: qsharp, or the run's)"
    )
    parser.add_argument(
        "--top-k-candidates", type=arguments.whole(1), metavar="N",
        help="how many of the likeliest tokens the guide scores at each step (default: 20, or the run's)",
    )  # fmt: skip
    parser.add_argument(
        "--others", choices=OTHERS, help="log-weight of the tokens that are not scored (default: mass, or the run's)"
    )
    parser.add_argument("--api-key-file", metavar="FILE", help=f"a file with the API key (default: ${API_KEY})")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts to the access log as well")


def check_arguments(options: argparse.Namespace) -> None:
    """Raise a UserError for arguments that do not go together, before a workdir is opened."""
    check_source(options)
    if options.ref is None and options.workdir is None:
        raise UserError("--guide needs the reference that it guides; give --ref")
    names = options.guide_names
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"the guides are called {', '.join(map(repr, names))}; give each a name of its own, NAME=MODEL")
    try:
        import prometheus_client  # noqa: F401
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is not installed; install "qsharp_jax[serve]"') from None


def run(workdir: Workdir | None, options: argparse.Namespace) -> None:
    """Serve until a signal."""
    from qsharp_jax.models import memory
    from qsharp_jax.models.value import ValueModel
    from qsharp_jax.serving import server
    from qsharp_jax.serving.app import Limits
    from qsharp_jax.serving.engine import Engine
    from qsharp_jax.serving.steering import Served

    api_key = _api_key(options)
    listening = server.listen(options.host, options.port)
    models = open_models(workdir, options)
    sampling, eta, mode = _settings(workdir, options, models)
    context = _context(options, models)
    platform = memory.default_device().platform
    chunk = CHUNKS.get(platform, CHUNK_ELSEWHERE)
    guides = options.guide_names if workdir is None else ["guide"]
    ref_name = options.ref_name or _name(workdir, options)
    if ref_name in guides:
        raise UserError(f"the reference and a guide are both called {ref_name!r}; give the reference another --name")
    served = Served(ref_name, tuple(guides), sampling, eta, mode, int(time.time()))
    limits = Limits(options.timeout, options.max_body, api_key, options.log_prompts)

    def make_engine(deliver: Any) -> Engine:
        ref, guide = models.load_ref(), models.load_guide() if guides else ()
        members = guide if isinstance(guide, tuple) else (guide,)
        if not all(isinstance(member, ValueModel) for member in members):
            raise UserError("the run's model is a policy of its own; `qsharp export` it, and serve its folder by --ref")
        return Engine(
            ref, members, sampling, rows=options.rows or _rows(models, context, platform), context=context,
            queue=options.queue, chunk=chunk, deliver=deliver, tokenizer=models.tokenizer,
        )  # fmt: skip

    code = server.run(make_engine, lambda: on_mesh(models), served, models.tokenizer, limits, listening)
    if code:
        sys.exit(code)


def _settings(workdir: Workdir | None, options: argparse.Namespace, models: Any) -> tuple[Sampling, float, str]:
    """Return what all requests share, and the default eta and mode."""
    from qsharp_jax.cli.generate import mode_of

    vocab_size = models.tokenizer.vocab_size
    if workdir is None:
        eta, sampling = DEFAULT_ETA, Sampling(stop_ids=models.tokenizer.stop_ids, vocab_size=vocab_size)
    else:
        eta, own = workdir.config.collect.eta, models.sampling
        sampling = Sampling(
            stop_ids=own.stop_ids, vocab_size=own.vocab_size, top_k_candidates=own.top_k_candidates, others=own.others
        )
    candidates = min(options.top_k_candidates or sampling.top_k_candidates, vocab_size)
    sampling = dataclasses.replace(
        sampling, top_k_candidates=candidates, others=options.others or sampling.others, eta=math.inf
    )
    return sampling, options.eta or eta, options.mode or mode_of(workdir)


def _context(options: argparse.Namespace, models: Any) -> int:
    longest = min(config.max_positions for config in models.configs.values())
    if options.context is not None and options.context > longest:
        raise UserError(f"--context is {options.context}; the models have {longest} positions")
    return options.context or min(CONTEXT, longest)


def _rows(models: Any, context: int, platform: str) -> int:
    from qsharp_jax.decoding import dequantized, rows_that_fit

    # The models are loaded by now, so that what is free is for caches, and on a CPU for copies of quantized weights.
    copies = dequantized(models.configs, models.weights)
    fitting = rows_that_fit([*models.configs.values()], context, weights=copies)
    return min(fitting, ROWS.get(platform, ROWS_ELSEWHERE))


def _name(workdir: Workdir | None, options: argparse.Namespace) -> str:
    if workdir is not None:
        return "reference"
    return Path(options.ref.partition("@")[0]).expanduser().resolve().name.removesuffix(".gguf")


def _api_key(options: argparse.Namespace) -> str | None:
    if options.api_key_file is None:
        return os.environ.get(API_KEY) or None
    try:
        key = Path(options.api_key_file).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"{options.api_key_file} is not UTF-8 text; write the API key into it") from None
    if not key:
        raise UserError(f"{options.api_key_file} is empty; write the API key into it")
    return key


def _eta(text: str) -> float:
    try:
        eta = float(text)
    except ValueError:
        eta = math.nan
    if not ETA.passes(eta) or math.isinf(eta):
        raise argparse.ArgumentTypeError(f"{text!r} is not {ETA.words}, below infinity")
    return eta
