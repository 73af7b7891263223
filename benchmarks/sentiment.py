"""A run on real weights and a real vocabulary: a language model's sentences are to end well, by VADER's word list.

    python benchmarks/sentiment.py --ref SmolLM2-135M-Instruct --workdir runs/sentiment [--config.KEY=VALUE ...]

The model continues openings such as "My sister called this morning and"; the reward is 1 where the compound score of
opening and continuation (`pip install vaderSentiment`; Hutto and Gilbert, 2014) is above 0.3. One round of rollouts is
collected; the guide starts from the first 10 of the reference's layers. Afterwards it is an ordinary workdir for
`benchmarks/others.py`, which imports the task from here.
"""

import argparse
import itertools
import json
import random
import types
from pathlib import Path

from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from qsharp_jax.experiments import pipeline
from qsharp_jax.run import config as configs
from qsharp_jax.run.session import Session
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.tasks import registry
from qsharp_jax.tasks.base import Problem

CONFIG = Path(__file__).parents[1] / "configs" / "arithmetic.py"
LAYERS = 10  # of the guide
WHO = (
    "My sister", "The neighbor", "Our teacher", "The old man", "A young doctor", "My best friend", "The manager",
    "Her brother", "The waiter", "A stranger", "The new student", "My grandmother", "The driver", "His boss",
    "The captain", "Our landlord",
)  # fmt: skip
DID = (
    "called this morning and", "opened the letter and", "looked at the house and", "came home from work and",
    "walked into the room and", "talked about the trip, which", "saw the results of the test, and",
    "tried the soup and", "wrote about the concert, which", "read the last page and", "met the team and",
    "finished the project, and", "thought about the city, which", "heard the news and", "visited the hospital, where",
    "left the party because",
)  # fmt: skip


def problems(config: ConfigDict, split: str, count: int, seed: int) -> list[Problem]:
    """The first `count` openings of a split: three quarters of all pairs are for training."""
    pairs = list(itertools.product(WHO, DID))
    random.Random(0).shuffle(pairs)
    border = len(pairs) * 3 // 4
    chosen = pairs[:border] if split == "train" else pairs[border:]
    if count > len(chosen):
        raise ValueError(f"there are {len(chosen)} openings of the split {split}; take as many or fewer")
    return [Problem(f"{who} {did}", f"{who} {did}", "") for who, did in chosen[:count]]


def reward(problem: Problem, response: str) -> float:
    score = SentimentIntensityAnalyzer().polarity_scores(f"{problem.prompt}{response}")
    return float(score["compound"] > 0.3)


registry.TASKS["sentiment"] = types.SimpleNamespace(
    FINITE=False, SYMBOLIC=False, check=lambda config: None, problems=problems, parse=lambda response: response,
    reward=reward,
)  # fmt: skip


def write_guide(ref: Path, folder: Path) -> None:
    """The reference's first layers as a language model of their own, from which the guide starts."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = json.loads((ref / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(shape, indent=1))
    weights = load_file(ref / "model.safetensors")
    kept = {
        name: array
        for name, array in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for path in ref.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())


def make_config(ref: Path, guide: Path) -> ConfigDict:
    c = configs.load(CONFIG, [])
    with c.unlocked():
        c.task = ConfigDict({"name": "sentiment"})
        del c.model, c.pretrain
    c.rounds = 1
    c.ref, c.guide = str(ref), str(guide)
    c.generate.top_k_candidates = 20
    c.generate.max_new_tokens = 24
    c.generate.prompt_bucket = 16
    c.collect.prompts, c.collect.samples = 192, 10
    c.collect.batch_size, c.collect.shard_rows = 48, 240
    c.fit.epochs, c.fit.batch_size, c.fit.length_bucket = 2, 16, 8
    c.fit.holdout = 0.1
    c.fit.optimizer.name = "adamw"
    c.fit.optimizer.learning_rate = 1e-4
    c.evaluate.problems, c.evaluate.samples, c.evaluate.guided_samples = 64, 4, 4
    c.evaluate.etas = (0.2,)
    c.evaluate.batch_size = 48
    return c


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ref", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    options, overrides = parser.parse_known_args()
    guide = options.workdir.with_name(options.workdir.name + "_guide")
    write_guide(options.ref, guide)
    config = make_config(options.ref.absolute(), guide.absolute())
    configs.override(config, overrides)
    pipeline.run(Session(Workdir.open(options.workdir, config)))


if __name__ == "__main__":
    main()
