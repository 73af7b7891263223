"""Small files in the formats of GSM8K, MATH, AIME and QuALITY, and where the real ones are, if they are here."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

REAL = Path(os.environ.get("QSHARP_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_real_data = pytest.mark.skipif(
    not (REAL / "gsm8k" / "test.jsonl").is_file(), reason=f"the data sets are not in {REAL}; QSHARP_DATA says where"
)


def settings(data, **changes) -> SimpleNamespace:
    return SimpleNamespace(data=str(data), evaluate_on="test", split_seed=0, **changes)


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def gsm8k_row(a: int, b: int) -> dict:
    return {
        "question": f"Sam has {a:,} eggs and finds {b}. How many has he?",
        "answer": f"Sam has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} eggs.\n#### {a + b:,}",
    }


def write_gsm8k(folder: Path, train: int = 40, test: int = 12) -> Path:
    write_lines(folder / "gsm8k" / "train.jsonl", [gsm8k_row(990 + i, 3) for i in range(train)])
    write_lines(folder / "gsm8k" / "test.jsonl", [gsm8k_row(i, 7) for i in range(test)])
    return folder


def write_math(folder: Path, train: int = 30) -> Path:
    """The training rows as the hub has them, without `answer`; the test rows as MATH-500's."""
    write_lines(
        folder / "math" / "train.jsonl",
        [
            {
                "problem": f"What is $\\frac{{{i}}}{{7}}$?", "level": "Level 1", "type": "Algebra",
                "solution": f"First \\boxed{{0}}, no: it is $\\boxed{{\\frac{{{i}}}{{7}}}}$.",
            }
            for i in range(train)
        ],
    )  # fmt: skip
    write_lines(
        folder / "math500" / "test.jsonl",
        [
            {
                "problem": f"What is $x+{i}$?", "solution": "...", "answer": f"x+{i}", "subject": "Algebra", "level": 1,
                "unique_id": f"test/algebra/{i}.json",
            }
            for i in range(5)
        ],
    )  # fmt: skip
    return folder


def write_aime(folder: Path) -> Path:
    rows = [{"id": 60 + i, "problem": f"Find {i}+20.", "solution": "...", "answer": f"{i + 20:03}"} for i in range(3)]
    write_lines(folder / "aime24" / "test.jsonl", rows)
    return folder


def quality_row(article: str, writer: int, labels=(1, 4)) -> dict:
    """One article and writer, as in the dataset's files of version 1.0.1."""
    return {
        "article_id": article, "set_unique_id": f"{article}_{writer}", "batch_num": "23", "writer_id": str(writer),
        "source": "Gutenberg", "title": f"Story {article}", "year": 1953, "author": "Nobody", "topic": "fiction",
        "article": f"Once upon a time there was the story {article}.\n" * 3, "url": "https://example.org",
        "questions": [
            {
                "question": f"Question {i} of {writer}?", "question_unique_id": f"{article}_{writer}_{i}",
                "options": [f"choice {n} of {i}" for n in range(1, 5)], "writer_label": label, "gold_label": label,
                "validation": [], "speed_validation": [], "difficult": 1,
            }
            for i, label in enumerate(labels)
        ],
    }  # fmt: skip


def write_quality(folder: Path, articles: int = 20) -> Path:
    train = [quality_row(f"a{i}", writer) for i in range(articles) for writer in (1, 2)]
    write_lines(folder / "quality" / "QuALITY.v1.0.1.htmlstripped.train", train)
    write_lines(folder / "quality" / "QuALITY.v1.0.1.htmlstripped.dev", [quality_row("d", 1, labels=(2, 3, 1))])
    return folder
