"""Run small jobs through the command line and collect the numbers that tests/test_frozen.py compares.

  python tests/frozen.py --record     run everything and write tests/frozen_numbers.json

Uses the command line only, and of a workdir only metrics.jsonl, results.json and the rollouts. A case's measurements:

  same     name -> what every machine has: prompts, shapes, names of tensors, config.json
  numbers  name -> a float, equal to the last bit on the same kind of machine and close elsewhere
  rows     name -> a short hash of each response; elsewhere a few of them may differ
  bits     name -> a hash of many values, compared on the same kind of machine only
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).with_name("frozen_numbers.json")
# Quick to compile. The number of cores is a part of `machine`, as XLA divides some sums among threads.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",  # the programs' folder is not a part of their keys
    "TQDM_DISABLE": "1",
}
# Values enter the tilt nonlinearly at these eta: where 1/eta is large, Q# tilts by log p + 1/eta, in which a wrong eta
# cancels. The warm-up is short, so that so few steps learn enough to guide by.
ARITHMETIC = (
    "rounds=2", "task.max_events=1", "task.equation_fraction=0",
    "pretrain.steps=40", "pretrain.batch_size=16", "pretrain.log_every=20", "pretrain.length_bucket=64",
    "collect.prompts=16", "collect.samples=8", "collect.batch_size=64", "collect.shard_rows=64",
    "generate.max_new_tokens=24", "generate.prompt_bucket=48",
    "fit.epochs=2", "fit.batch_size=16", "fit.length_bucket=64", "fit.log_every=4", "fit.holdout=0.2",
    "fit.optimizer.warmup_steps=2",
    "policy.batch_size=16", "policy.prompts=16", "policy.optimizer.warmup_steps=50", "ppo.epochs=1", "dpo.epochs=1",
    "collect.eta=0.3", "evaluate.problems=16", "evaluate.samples=2", "evaluate.batch_size=32", "evaluate.etas=0.3,",
)  # fmt: skip
STAR_GRAPH = (
    "rounds=2", "task.path_length=3", "task.num_nodes=6",
    "model.embed=32", "model.layers=1", "model.heads=2", "model.kv_heads=2", "model.mlp=32",
    "pretrain.steps=120", "pretrain.batch_size=64", "pretrain.log_every=40", "pretrain.length_bucket=32",
    "collect.prompts=24", "collect.batch_size=16", "collect.shard_rows=24", "generate.prompt_bucket=32",
    "fit.epochs=2", "fit.batch_size=8", "fit.optimizer.learning_rate=0.01", "fit.optimizer.warmup_steps=2",
    "fit.length_bucket=32", "fit.save_every=4", "fit.log_every=2",
    "collect.eta=0.4", "evaluate.problems=16", "evaluate.samples=2", "evaluate.batch_size=32", "evaluate.etas=0.4,",
)  # fmt: skip
FEW = ("qsharp", "export of the ref", "export of the guide", "generate, ref", "score, ref")
KILLED = "star graph, killed and resumed"
RUNS = {
    "qsharp": ("arithmetic", ARITHMETIC),
    "star graph": ("star_graph", STAR_GRAPH),
    # With this seed the rollouts have right answers: without, Adam would scale up rounding errors to whole steps.
    "ppo": ("arithmetic", (*ARITHMETIC, "algorithm=ppo", "rounds=1", "seed=5")),
    "dpo": ("arithmetic", (*ARITHMETIC, "algorithm=dpo", "rounds=1")),
    "cd": ("arithmetic", (*ARITHMETIC, "algorithm=cd", "rounds=1")),
}
PROMPTS = ("Sam has 54 eggs. Sam gives 12 eggs to Mia. How many eggs does Sam have?", "Mia has 7 eggs.")
RESPONSES = ("54-12=42. \\boxed{42}", "12-7=5. \\boxed{7}")
SAMPLING = ("--eta", "0.3,inf", "--samples", "4", "--seed", "3", "--top-k-candidates", "8", "--max-new-tokens", "16")
READABLE = ("reward", "kl", "kl_high", "response_tokens", "finished", "pass_1", "reward_minus_cd")
NOT_FROZEN = ("second", "flops", "goodput", "bytes")  # parts of the names of what a clock or an allocator says
OF_THIS_PROCESS = ("tokens", "row_steps")  # in metrics.jsonl; 0 for what a resumed run found done


def machine() -> dict:
    """Describe what the last bits of a result depend on."""
    import jax
    import jaxlib
    import numpy

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict((key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines))
    model = [facts.get(name, "") for name in ("vendor_id", "cpu family", "model", "stepping")]
    return {
        "cpu": [platform.machine(), *model],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_flags": digest(sorted(facts.get("flags", "").split())),
        "jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": numpy.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip


def digest(value) -> str:
    """Hash any JSON value; floats enter by their shortest exact form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def short(values) -> list[str]:
    return [digest(value)[:4] for value in values]


def command(*arguments) -> None:
    """Run a `qsharp` command and check that it succeeds."""
    from qsharp_jax import cli

    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([str(argument) for argument in arguments])
    assert code == 0, (code, arguments)


def run_arguments(name: str, workdir: Path, *changes: str) -> list[str]:
    """Arguments of `qsharp` for a run; all runs in one folder share their compiled programs."""
    workdir.mkdir(exist_ok=True)
    programs = workdir.with_name("programs")
    programs.mkdir(exist_ok=True)
    if not (workdir / "programs").is_symlink():
        (workdir / "programs").symlink_to(programs)
    config, settings = RUNS[name]
    options = [f"--config.{setting}" for setting in (*settings, *changes)]
    return ["run", "--config", str(ROOT / "configs" / f"{config}.py"), "--workdir", str(workdir), *options]


# Read results from files


def is_frozen(name: str) -> bool:
    return not any(part in name for part in NOT_FROZEN)


def measure_run(workdir: Path) -> dict:
    """Collect losses, rollouts and results of a workdir."""
    numbers, same, rows, bits = {}, {}, {}, {}
    metrics = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = {
            name: value for name, value in json.loads(line).items() if is_frozen(name) and name not in OF_THIS_PROCESS
        }
        metrics[row["phase"], row.get("step")] = row  # after a kill the last of several
    for (phase, step), row in metrics.items():
        label = phase if step is None else f"{phase}, {step}"
        numbers |= {f"{label}: {name}": row[name] for name in ("loss", "gradient_norm") if name in row}
    bits["metrics.jsonl"] = digest(list(metrics.values()))
    for folder in sorted((workdir / "rollouts").iterdir()):
        measure_rollouts(folder, numbers, same, rows, bits)
    for row in json.loads((workdir / "results.json").read_text()):
        label = " ".join(str(row[name]) for name in ("method", "eta", "round"))
        numbers |= {f"{label}: {name}": row[name] for name in READABLE if row.get(name) is not None}
        bits[label] = digest({name: value for name, value in row.items() if is_frozen(name)})
    same["results"] = len(json.loads((workdir / "results.json").read_text()))
    return {"same": same, "numbers": numbers, "rows": rows, "bits": bits}


def measure_rollouts(folder: Path, numbers: dict, same: dict, rows: dict, bits: dict) -> None:
    import pyarrow.parquet as parquet

    shards = [parquet.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))]
    rollouts = [rollout for shard in shards for rollout in shard]
    name = folder.name
    same[f"{name}: rows of shards"] = [len(shard) for shard in shards]
    same[f"{name}: prompts and seeds"] = digest(
        [[row[key] for key in ("prompt_id", "round", "prompt_tokens", "eta", "seed")] for row in rollouts]
    )
    rows[name] = short([row["response_tokens"], row["switch"], row["reward"], row["finished"]] for row in rollouts)
    bits[name] = digest(rollouts)
    numbers[f"{name}: rewards"] = sum(row["reward"] for row in rollouts)
    numbers[f"{name}: response tokens"] = sum(len(row["response_tokens"]) for row in rollouts)


def measure_folder(folder: Path) -> dict:
    """Collect the bytes of every tensor of an exported model, the norms of some, and config.json."""
    import numpy as np
    from safetensors.numpy import load_file

    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    return {
        "same": {
            "config.json": digest(json.loads((folder / "config.json").read_text())),
            "tensors": digest({name: [*t.shape, str(t.dtype)] for name, t in tensors.items()}),
        },
        "numbers": {
            f"norm of {name}": float(np.linalg.norm(tensors[name].astype(np.float64).ravel()))
            for name in sorted(tensors)
            if "layers" not in name or "layers.0." in name
        },
        "rows": {},
        "bits": {
            name: hashlib.sha256(np.ascontiguousarray(t).tobytes()).hexdigest()[:16]
            for name, t in sorted(tensors.items())
        },
    }


def measure_lines(path: Path) -> dict:
    """Collect responses and per-token numbers from the output of `generate` or `score`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    numbers, same, rows, bits = {}, {}, {}, {}
    kinds = [name for name in ("log_probs", "ref_log_probs", "kl", "values") if name in lines[0]]
    same["lines"] = digest([[line.get(name) for name in ("prompt", "eta", "seed")] for line in lines])
    if "tokens" in lines[0]:
        rows["responses"] = short([line["tokens"], line["response"], line["finished"]] for line in lines)
        same["first response"] = lines[0]["response"]
    for name in kinds:
        per_line = [[v for v in line[name] or () if v is not None] for line in lines]
        some = list(enumerate(per_line))[:: max(1, len(lines) // 4)]
        numbers |= {f"{name} of line {i}": math.fsum(v) for i, v in some}
        bits[name] = digest([line[name] for line in lines])
    return {"same": same, "numbers": numbers, "rows": rows, "bits": bits}


# Run the cases


def measure(few: bool) -> dict[str, dict]:
    """Run all cases, or the `FEW` alone; case -> kind -> name -> value."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = {}

        def case(name, measured):
            cases[name] = measured
            print(f"{time.process_time():6.1f} s of CPU: {name}", file=sys.stderr, flush=True)

        texts = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))

        def answer(family):
            models = ("--ref", folder / family, "--guide", folder / "guide")
            output = folder / f"{family}_generated.jsonl"
            command("generate", *models, *SAMPLING, "--output", output, *PROMPTS)
            case(f"generate, {family}", measure_lines(output))
            output = folder / f"{family}_scored.jsonl"
            command("score", *models, "--input", folder / "texts.jsonl", "--output", output)
            case(f"score, {family}", measure_lines(output))

        command(*run_arguments("qsharp", folder / "qsharp"))
        case("qsharp", measure_run(folder / "qsharp"))
        for what in ("ref", "guide"):
            command("export", "--workdir", folder / "qsharp", "--what", what, "--out", folder / what)
            case(f"export of the {what}", measure_folder(folder / what))
        answer("ref")
        if few:
            return cases
        for algorithm in ("ppo", "dpo", "cd"):
            command(*run_arguments(algorithm, folder / algorithm, f"ref={folder / 'ref'}"))
            case(algorithm, measure_run(folder / algorithm))
        command(*run_arguments("star graph", folder / "star"))
        case("star graph", measure_run(folder / "star"))
        kill(folder / "killed")
        command(*run_arguments("star graph", folder / "killed"))
        case(KILLED, measure_run(folder / "killed"))
        write_families(folder)
        for family in FAMILIES:
            answer(family)
        return cases


def kill(workdir: Path) -> None:
    """Start the run on star graphs and kill it once its second fit has logged a step behind its first checkpoint."""
    arguments = run_arguments("star graph", workdir)
    process = subprocess.Popen([sys.executable, "-m", "qsharp_jax.cli", *arguments], stdout=subprocess.DEVNULL)
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and '"phase": "round 2: fit", "step": 6,' in metrics.read_text()):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


def write_families(folder: Path) -> None:
    """Write a random model per family, with the arithmetic task's tokenizer so that one guide fits all."""
    import numpy as np
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ref")
    common = {
        "vocab_size": json.loads((folder / "ref" / "config.json").read_text())["vocab_size"],
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    configs = {
        "gpt2": transformers.GPT2Config(
            **{name: common[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")},
            n_embd=32, n_layer=1, n_head=4, n_positions=128,
        ),
        "llama": transformers.LlamaConfig(**common),
        "qwen2": transformers.Qwen2Config(**common, tie_word_embeddings=True),
        "qwen3": transformers.Qwen3Config(**common, head_dim=12),
    }  # fmt: skip
    for name, config in configs.items():
        model = transformers.AutoModelForCausalLM.from_config(config)
        random = np.random.default_rng(0)
        with torch.no_grad():
            for key, leaf in sorted(model.named_parameters()):
                noise = torch.from_numpy(random.standard_normal(leaf.shape, np.float32))
                scaled = noise * leaf.shape[-1] ** -0.5 if leaf.ndim > 1 else 0.1 * noise
                leaf.copy_(1 + scaled if leaf.ndim == 1 and "bias" not in key else scaled)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def measure_elsewhere(xla_flags: str = "", few: bool = False) -> dict:
    """Run all cases, or few of them, in a new process with a fixed environment; returns {"machine": ..., "cases": ...}."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= ENVIRONMENT | {"XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=false {xla_flags}".strip()}
    # As tests/conftest.py: compiling takes half as long; XLA ends the process at a flag that it does not know.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        environment["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(out), *["--few"] * few], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and out.exists(), (done.returncode, done.stdout[-4000:])  # 0 after SIGTERM as well
        print(done.stdout[-2000:])
        return json.loads(out.read_text())


def write(path: Path, measured: dict) -> None:
    """One entry per line, so that a diff says which number moved."""
    lines = []
    recorded = {case: kinds for case, kinds in measured["cases"].items() if case != KILLED}  # as the star graph's
    for case, kinds in recorded.items():
        parts = [
            f"  {json.dumps(kind)}: {{\n"
            + ",\n".join(f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())
            + "\n  }"
            for kind, entries in kinds.items()
        ]
        lines.append(f" {json.dumps(case)}: {{\n" + ",\n".join(parts) + "\n }")
    text = f'{{"machine": {json.dumps(measured["machine"])},\n"cases": {{\n' + ",\n".join(lines) + "\n}}\n"
    assert json.loads(text) == measured | {"cases": recorded}
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write frozen_numbers.json")
    parser.add_argument("--xla-flags", default="", help="for example --xla_cpu_max_isa=AVX2, as another CPU computes")
    parser.add_argument("--out", type=Path, default=RECORDED, help="where --record writes")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in this process; from measure_elsewhere
    parser.add_argument("--few", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        options.measure.write_text(json.dumps({"machine": machine(), "cases": measure(options.few)}))
    elif options.record:
        write(options.out, measure_elsewhere(options.xla_flags))
    else:
        parser.error("give --record")


if __name__ == "__main__":
    main()
