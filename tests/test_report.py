"""The report from a workdir's files alone: a table that can be read back, plots that are pictures, some examples."""

import json
import math
import struct

import helpers
import numpy as np
import pytest

from qsharp_jax import evaluate, report
from qsharp_jax.errors import UserError
from qsharp_jax.session import Session
from qsharp_jax.workdir import Workdir


def make_row(method, reward, **changes):
    """A row as `evaluate` writes it."""
    row = dict(
        method=method, eta=None, round=0, n=10, reward=reward, reward_low=reward - 0.1, reward_high=reward + 0.05,
        kl=None, kl_truncated=None, response_tokens=31.26, samples=80, seconds=2.0,
    )  # fmt: skip
    return row | changes


ROWS = [
    make_row("pi_ref", 0.3712, kl=0.0, kl_truncated=0.0),
    make_row("pi_ref_greedy", 0.55, kl=0.0, kl_truncated=4.5678),
    make_row("qsharp", 0.71, round=1, eta=0.1, kl=0.41, kl_truncated=0.41),
    make_row("qsharp", 0.62, round=2, eta=0.5, kl=0.27, kl_truncated=0.27),
    make_row("qsharp", 0.8, round=2, eta=0.1, kl=0.7249, kl_truncated=0.7249),
    make_row("cd", 0.5, round=2, eta=0.1, kl=1.14, kl_truncated=1.14),
    make_row("majority_8", 0.49, round=2),
    make_row("best_of_8", 0.83, round=2, response_tokens=250.0),
]


def make_sample(problem, eta, reward, response):
    return {
        "problem_id": problem, "prompt": f"prompt of {problem}", "answer": "1,2,3", "response": response, "eta": eta,
        "reward": reward, "parsed": response, "tokens": [3, 4, 2], "kl": 0.1, "kl_truncated": 0.1, "finished": True,
        "seconds": 0.1,
    }  # fmt: skip


def fill(session, rows=ROWS, etas=(0.5, 0.1)):
    """The files that an evaluation leaves: results, and the samples behind them."""
    session.workdir.results.write_text(json.dumps(rows))
    unguided = [make_sample(f"p{i}", None, 0.0, f"unguided {i}.{j}") for i in range(5) for j in range(3)]
    evaluate.write_samples(evaluate.samples_path(session, "pi_ref", 0), unguided)
    guided = [make_sample(f"p{i}", eta, float(i == 3), f"guided {i} at {eta}") for i in range(5) for eta in etas]
    evaluate.write_samples(evaluate.samples_path(session, "qsharp", 2), guided)
    rng = np.random.default_rng(0)
    values = [{"values": rng.random(1 + i % 4).tolist(), "reward": float(i % 2), "problem_id": "p"} for i in range(30)]
    evaluate.write_samples(evaluate.samples_path(session, "pi_ref_values", 2), values)
    return session


def size_of_png(path):
    """Width and height from the file's header, which must be that of a PNG (RFC 2083)."""
    content = path.read_bytes()
    assert content[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def cells_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


# --- The table ------------------------------------------------------------------------------------------------------


def test_the_tables_columns_line_up():
    """As text too: every line is as long as the others, and has its bars where they have theirs."""
    lines = report.table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    bars = [[at for at, character in enumerate(line) if character == "|"] for line in lines]
    assert all(places == bars[0] for places in bars) and len({len(line) for line in lines}) == 1
    assert set(lines[1]) <= set("|- ")  # Markdown's second line


def test_the_table_shows_the_rows_numbers():
    """Each can be read back to the digits shown; what a method does not have is left blank."""
    header, _, *lines = cells_of(report.table(ROWS))
    assert len(lines) == len(ROWS)
    for row, cells in zip(ROWS, lines):
        shown = dict(zip(header, cells, strict=True))
        assert float(shown["reward"]) == pytest.approx(row["reward"], abs=5.1e-4)
        low, high = map(float, shown["95% interval"].split(" .. "))
        assert [low, high] == pytest.approx([row["reward_low"], row["reward_high"]], abs=5.1e-4)
        assert int(shown["problems"]) == row["n"] and int(shown["samples"]) == row["samples"]
        assert shown["round"] == (str(row["round"]) if row["round"] else "")
        for column, key in (("eta", "eta"), ("KL", "kl"), ("KL truncated", "kl_truncated")):
            assert (float(shown[column]) if shown[column] else None) == pytest.approx(row[key], abs=5.1e-4)
        assert float(shown["tokens"]) == pytest.approx(row["response_tokens"], abs=0.051)
    speeds = {cells[0]: int(cells[-1]) for cells in lines}
    assert speeds["pi_ref"] == round(31.26 * 80 / 2)  # tokens of 80 responses in two seconds
    assert speeds["best_of_8"] == round(250 * 10 / 2)  # tokens of ten answers, each made of eight responses


# --- The files ------------------------------------------------------------------------------------------------------

PLOTS = ("frontier.png", "rounds.png", "calibration.png")


def test_a_report_is_a_page_and_its_pictures(tmp_path):
    """report.md holds the table and names every picture; the text for the terminal holds the table and every path."""
    session = fill(helpers.session(tmp_path))
    text = report.write(session)
    page = (tmp_path / "report.md").read_text()
    assert report.table(ROWS) in page and report.table(ROWS) in text
    for name in PLOTS:
        assert f"({name})" in page and str(tmp_path / name) in text
        width, height = size_of_png(tmp_path / name)
        assert width > 300 and height > 200 and (tmp_path / name).stat().st_size > 5000
    assert str(tmp_path / "report.md") in text and not list(tmp_path.glob("*.tmp"))


def test_the_examples_begin_where_the_guide_made_the_difference(tmp_path):
    """At the eta of collection, beside pi_ref's first sample of the same problem."""
    session = fill(helpers.session(tmp_path, "collect.eta=0.1"))
    page = report.write(session)
    first = page.index("prompt of p3")
    assert all(first <= page.index(f"prompt of p{i}") for i in range(5) if f"prompt of p{i}" in page)
    assert "unguided 3.0   (wrong)" in page and "guided 3 at 0.1 " in page and "right; answer 1,2,3" in page
    assert "at 0.5" not in page


def test_whoever_has_the_files_can_make_the_report_again(tmp_path):
    """In another session, opened without a config; no model is needed, and none is there."""
    session = fill(helpers.session(tmp_path))
    text, page = report.write(session), (tmp_path / "report.md").read_text()
    session.workdir.close()
    for name in ("report.md", *PLOTS):
        (tmp_path / name).unlink()
    with Workdir.open(tmp_path) as workdir:
        assert report.write(Session(workdir)) == text
    assert (tmp_path / "report.md").read_text() == page and all((tmp_path / name).exists() for name in PLOTS)
    assert not (tmp_path / "ref").exists() and not (tmp_path / "guide").exists()


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:2],  # before the first fit
        ROWS[:3],  # after round 1 of 2
        ROWS[2:3],
        [make_row("pi_ref", 0.0, reward_low=0.0, reward_high=0.0, kl=0.0, kl_truncated=0.0), *ROWS[6:]],
    ],
)
def test_a_report_of_what_there_is(tmp_path, rows):
    """Without a guide, without CD, without samples or values: what is missing is left out."""
    session = helpers.session(tmp_path)
    session.workdir.results.write_text(json.dumps(rows))
    report.write(session)
    page = (tmp_path / "report.md").read_text()
    assert report.table(rows) in page and "calibration" not in page and "no samples" in page
    size_of_png(tmp_path / "frontier.png"), size_of_png(tmp_path / "rounds.png")


def test_guidance_at_eta_inf_is_shown_as_such(tmp_path):
    """`evaluate.etas=inf,0.1` is allowed, and means pi_ref; JSON has null for it."""
    session = helpers.session(tmp_path, "evaluate.etas=inf,0.1", "collect.eta=inf")
    rows = [
        ROWS[0],
        make_row("qsharp", 0.36, round=1, kl=0.0, kl_truncated=0.0),
        make_row("qsharp", 0.37, round=2, kl=0.0, kl_truncated=0.0),
        *(make_row(method, 0.8, round=2, eta=0.1, kl=0.7, kl_truncated=0.7) for method in ("qsharp", "cd")),
        make_row("cd", 0.37, round=2, kl=0.0, kl_truncated=0.0),
    ]
    fill(session, rows, etas=(None, 0.1))
    page = report.write(session)
    header, _, *lines = cells_of(report.table(rows))
    assert [line[header.index("eta")] for line in lines] == ["", "inf", "inf", "0.1", "0.1", "inf"]
    assert "Q# eta inf" in page and math.isinf(session.config.collect.eta)


# --- What cannot be reported ----------------------------------------------------------------------------------------


def test_without_results_it_says_what_to_run(tmp_path):
    session = helpers.session(tmp_path)
    with pytest.raises(UserError) as caught:
        report.write(session)
    message = str(caught.value)
    assert str(session.workdir.results) in message and f"qsharp evaluate --workdir {tmp_path}" in message


def test_damaged_results_are_named(tmp_path):
    session = helpers.session(tmp_path)
    session.workdir.results.write_text(json.dumps(ROWS)[:-20])
    with pytest.raises(UserError, match=f"{session.workdir.results} is damaged.*evaluate again"):
        report.write(session)
