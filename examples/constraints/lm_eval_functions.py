"""The functions of lm_eval.yaml, over the prompts and constraints of task.py."""

import runpy
from pathlib import Path
from typing import Any

from datasets import Dataset

TASK = runpy.run_path(str(Path(__file__).with_name("task.py")))


def dataset(**_: Any) -> dict[str, Dataset]:
    """The test prompts, as the harness takes a data set; its arguments are those of the harness for all of them."""
    return {"test": Dataset.from_list(TASK["problems"]("test"))}


def score(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """1 for a response that keeps its constraint, else 0; the harness does not say whether it ended by itself."""
    return {"kept": float(TASK["CONSTRAINTS"][doc["constraint"]](results[0].strip()))}
