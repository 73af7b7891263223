"""The report from a workdir's files alone: tables that can be read back, plots that are pictures, a page."""

import html.parser
import json
import math
import re
import struct

import helpers
import matplotlib.figure
import numpy as np
import pytest
from helpers import refusal

from qsharp_jax import report
from qsharp_jax.evaluation import measure, statistics
from qsharp_jax.report import examples, page, plots, tables
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError


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


def make_sample(problem, eta, reward, response, values=None):
    sample = {
        "problem_id": problem, "prompt": f"prompt of {problem}", "answer": "1,2,3", "response": response, "eta": eta,
        "reward": reward, "parsed": response, "tokens": [4, 5, 2], "kl": 0.1, "kl_truncated": 0.1, "finished": True,
        "seconds": 0.1,
    }  # fmt: skip
    return sample if values is None else sample | {"values": values}


def fill(session, rows=ROWS, etas=(0.5, 0.1)):
    """The files that an evaluation leaves: results, and the samples behind them."""
    session.workdir.results.write_text(json.dumps(rows))
    unguided = [make_sample(f"p{i}", None, 0.0, f"unguided {i}.{j}") for i in range(5) for j in range(3)]
    measure.write_samples(measure.samples_path(session.workdir, "pi_ref", 0), unguided)
    guided = [
        make_sample(f"p{i}", eta, float(i == 3), f"guided {i} at {eta}", [0.25, None, 0.875])
        for i in range(5)
        for eta in etas
    ]
    measure.write_samples(measure.samples_path(session.workdir, "qsharp", 2), guided)
    rng = np.random.default_rng(0)
    values = [{"values": rng.random(3).tolist(), "reward": 0.0, "problem_id": f"p{i // 3}"} for i in range(15)]
    measure.write_samples(measure.samples_path(session.workdir, "pi_ref_values", 2), values)
    return session


def size_of_png(path):
    """Width and height from the file's header, which must be that of a PNG (RFC 2083)."""
    content = path.read_bytes()
    assert content[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def cells_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_tables_columns_line_up():
    """The table reads as text too: every line is as long as the others, and has its bars where they have theirs."""
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


def test_a_table_for_a_terminal_fits_it_and_has_the_same_cells():
    """In the widest case: long names, long numbers, and every column."""
    wide = dict(
        n=10_000, samples=160_000, reward=-123.456, reward_low=-1234.567, reward_high=-100.123, kl=1234.567,
        kl_truncated=1234.567, response_tokens=12345.6, finished=1.0, no_answer=1.0, round=12, eta=1e-06,
    )  # fmt: skip
    rows = [make_row("weighted_majority_128", **wide), make_row("pi_ref_top_k", **wide), make_row("qsharp", **wide)]
    parts = report.table(rows, width=100).split("\n\n")
    assert len(parts) > 1 and max(len(line) for part in parts for line in part.splitlines()) <= 100
    whole, first, *others = ([cells_of(part)[at] for at in (0, 2, 3, 4)] for part in (report.table(rows), *parts))
    assert all([line[:3] for line in other] == [line[:3] for line in whole] for other in others)
    assert [sum((other[n][3:] for other in others), start=line) for n, line in enumerate(first)] == whole


def full_row(method, eta=None, number=0, **changes):
    """A row with all figures and their intervals."""
    row = make_row(method, 0.5, eta=eta, round=number, kl=0.7, kl_truncated=0.6) | changes
    names = ("kl", "kl_truncated", "response_tokens", "finished", "no_answer", "pass_1", "pass_4", "majority_4")
    row |= {"finished": 0.9, "no_answer": 0.05, "pass_1": row["reward"], "pass_4": 0.8, "majority_4": 0.6}
    return row | {f"{name}_{end}": row[name] + sign for name in names for end, sign in (("low", -0.01), ("high", 0.02))}


def difference(name, value):
    return {name: value, f"{name}_low": value - 0.01, f"{name}_high": value + 0.02}


def test_the_papers_table():
    """pi_ref, CD, Q# in the paper's order, at the eta that is asked for, each figure with its interval."""
    rows = [
        full_row("pi_ref", kl=0.0), full_row("pi_ref_greedy"), full_row("qsharp", 0.1, 1, kl=0.1),
        full_row("qsharp", 0.5, 2, kl=0.2), full_row("qsharp", 0.1, 2, kl=0.3), full_row("cd", 0.5, 2, kl=0.4),
        full_row("cd", 0.1, 2, kl=0.5), make_row("best_of_4", 0.9, round=2), full_row("qsharp_greedy", 0.2, 2, kl=0.6),
    ]  # fmt: skip
    for eta, shown, kls in ((0.1, 0.1, [0.5, 0.3]), (0.5, 0.5, [0.4, 0.2]), (0.2, 0.1, [0.5, 0.3])):
        words, found = tables.paper_table(rows, eta).split("\n\n")
        header, _, *lines = cells_of(found)
        assert words == f"At eta {shown}:" and header == ["method", "pass@1", "maj1@4", "KL"]
        assert [line[0] for line in lines] == ["pi_ref", "CD", "Q#"] and lines[0][-1] == "0"
        assert [float(line[-1].split(" ")[0]) for line in lines[1:]] == kls
        assert lines[2][2] == "0.600 (0.590 .. 0.620)"
    assert tables.paper_table(rows[:2], 0.1) == ""


def test_pass_at_k_and_the_other_figures_have_their_intervals():
    rows = [full_row("pi_ref"), full_row("qsharp", 0.1, 2), make_row("best_of_4", 0.9, round=2)]
    header, _, *lines = cells_of(tables.passes_table(rows))
    assert header == ["method", "eta", "round", "pass@1", "pass@4", "maj1@4"] and len(lines) == 2
    assert lines[1] == ["Q#", "0.1", "2", *(f"{x:.3f} ({x - 0.01:.3f} .. {x + 0.02:.3f})" for x in (0.5, 0.8, 0.6))]
    header, _, *lines = cells_of(tables.intervals_table(rows))
    assert header[3:] == ["KL", "KL truncated", "tokens", "finished", "no answer"] and len(lines) == 2
    assert lines[0][-2:] == ["0.900 (0.890 .. 0.920)", "0.050 (0.040 .. 0.070)"]
    assert tables.passes_table(ROWS) == tables.intervals_table(ROWS) == ""  # of an older version


def test_differences_have_their_sign():
    rows = [
        full_row("pi_ref"),
        full_row("qsharp", 0.1, 2) | difference("reward_minus_pi_ref", 0.3) | difference("reward_minus_cd", -0.02)
        | difference("kl_minus_cd", -0.5),
        full_row("cd", 0.1, 2) | difference("reward_minus_pi_ref", 0.32),
    ]  # fmt: skip
    header, _, *lines = cells_of(tables.differences_table(rows))
    assert header == ["difference", "eta", "round", "pass@1", "KL"]
    assert [line[0] for line in lines] == ["Q# - pi_ref", "CD - pi_ref", "Q# - CD"]
    assert lines[2] == ["Q# - CD", "0.1", "2", "-0.020 (-0.030 .. +0.000)", "-0.500 (-0.510 .. -0.480)"]
    assert tables.differences_table(rows[:1]) == ""


def test_a_round_without_any_reward_is_a_line_of_the_table_of_rollouts():
    line = {
        "phase": "round 1: collect", "rollouts": 24, "reward": None, "response_tokens": 7.0, "finished": 0.5,
        "labelled": 1.0, "varied": 0.0, "seconds": 2.0,
    }  # fmt: skip
    header, _, cells = cells_of(tables.rollouts_table([line]))
    shown = dict(zip(header, cells, strict=True))
    assert (shown["rollouts"], shown["reward"], shown["tokens"], shown["varied"]) == ("24", "", "7.0", "0.000")


PLOTS = ("frontier.png", "rounds.png", "calibration.png", "lengths.png")


def test_a_report_is_a_page_and_its_pictures(tmp_path):
    """report.md holds the table and names every picture; the text for the terminal holds the table and every path."""
    session = fill(helpers.session(tmp_path))
    text = report.write(session.workdir)
    page = (tmp_path / "report.md").read_text()
    assert report.table(ROWS) in page and report.table(ROWS, width=100) in text
    for name in PLOTS:
        assert f"({name})" in page and str(tmp_path / name) in text
        width, height = size_of_png(tmp_path / name)
        assert width > 300 and height > 200 and (tmp_path / name).stat().st_size > 5000
    assert str(tmp_path / "report.md") in text and not list(tmp_path.glob("*.tmp"))


def test_the_examples_begin_where_the_guide_made_the_difference(tmp_path):
    """At the eta of collection, beside pi_ref's first sample of the same problem."""
    session = fill(helpers.session(tmp_path, "collect.eta=0.1"))
    page = report.write(session.workdir)
    first = page.index("prompt of p3")
    assert all(first <= page.index(f"prompt of p{i}") for i in range(5) if f"prompt of p{i}" in page)
    assert "unguided 3.0   (wrong)" in page and "guided 3 at 0.1 " in page and "right; answer 1,2,3" in page
    assert "at 0.5" not in page


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_no_example_comes_twice(count):
    pairs = [examples.Pair(*(make_sample(f"p{i}", 0.1, r, "x") for r in (0.0, float(i == 0))), i) for i in range(count)]
    text = examples.text("qsharp", examples.Examples("qsharp", 0.1, pairs, {}))
    shown = re.findall(r"prompt of (p\d)", text)
    assert len(shown) == len(set(shown)) == min(count, 3) and shown[0] == "p0"


def test_whoever_has_the_files_can_make_the_report_again(tmp_path):
    """In another session, opened without a config; no model is needed, and none is there."""
    session = fill(helpers.session(tmp_path))
    text, page = report.write(session.workdir), (tmp_path / "report.md").read_text()
    session.workdir.close()
    shown = (tmp_path / "examples.html").read_text()
    for name in ("report.md", "examples.html", *PLOTS):
        (tmp_path / name).unlink()
    with Workdir.open(tmp_path) as workdir:
        assert report.write(workdir) == text
    assert (tmp_path / "report.md").read_text() == page and all((tmp_path / name).exists() for name in PLOTS)
    assert (tmp_path / "examples.html").read_text() == shown
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
    report.write(session.workdir)
    page = (tmp_path / "report.md").read_text()
    assert report.table(rows) in page and "calibration" not in page and "no samples" in page
    size_of_png(tmp_path / "frontier.png"), size_of_png(tmp_path / "rounds.png")


def test_the_only_eta_of_a_method_is_labeled_once():
    figure = matplotlib.figure.Figure()
    axes = figure.subplots()
    plots.frontier(axes, [make_row("pi_ref", 0.3, kl=0.0), make_row("cd", 0.9, eta=0.1, kl=3.7, round=1)])
    assert [text.get_text() for text in axes.texts] == ["η=0.1"]


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
    page = report.write(session.workdir)
    header, _, *lines = cells_of(report.table(rows))
    assert [line[header.index("eta")] for line in lines] == ["", "inf", "inf", "0.1", "0.1", "inf"]
    assert "Q# eta inf" in page and math.isinf(session.config.collect.eta)


def test_values_at_places_of_a_response():
    scored = [{"values": [0.1, 0.2, 0.3, 0.4, 0.5]}, {"values": [0.7]}, {"values": [0.0, 1.0]}]
    assert plots.at_place(scored, 0.0).tolist() == [0.1, 0.7, 0.0]
    assert plots.at_place(scored, 0.25).tolist() == [0.2, 0.7, 0.0]
    assert plots.at_place(scored, 1.0).tolist() == [0.5, 0.7, 1.0]


def test_bins_of_lengths_hold_every_sample_once():
    """Ties stay together; rewards and intervals are those of a bin's samples, drawn by problem."""
    rng = np.random.default_rng(0)
    samples = [
        {"problem_id": f"p{i // 4}", "tokens": [0] * int(n), "reward": float(n > 6)}
        for i, n in enumerate(rng.integers(3, 12, 200))
    ]
    bins = plots.reward_by_length(samples)
    assert sum(b["count"] for b in bins) == 200 and 3 <= len(bins) <= plots.BINS
    assert [b["response_tokens"] for b in bins] == sorted(b["response_tokens"] for b in bins)
    assert bins[0]["reward"] == bins[0]["reward_high"] == 0 and bins[-1]["reward"] == bins[-1]["reward_low"] == 1
    total = sum(b["count"] * b["reward"] for b in bins)
    assert total == pytest.approx(sum(sample["reward"] for sample in samples))
    (only,) = plots.reward_by_length([sample | {"tokens": [0]} for sample in samples])
    by_problem = np.asarray(statistics.by_problem(samples, "reward"))
    assert (only["reward_low"], only["reward_high"]) == pytest.approx(statistics.bootstrap(by_problem))


class Page(html.parser.HTMLParser):
    """Checks that every tag is closed in its turn, and keeps what there is."""

    EMPTY = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_needs_no_other_file_escapes_texts_and_folds_long_problems(tmp_path):
    session = fill(helpers.session(tmp_path, "collect.eta=0.1"))
    path, bad = measure.samples_path(session.workdir, "pi_ref", 0), '<script>alert("&amp;")</script>'
    rows = [row | {"prompt": "word " * 1000, "answer": bad, "parsed": bad} for row in measure.read_samples(path)]
    measure.write_samples(path, rows)
    report.write(session.workdir)
    text = (tmp_path / "examples.html").read_text()
    found = Page(text)
    assert {"html", "head", "style", "body", "h1"} <= set(found.tags) and "script" not in found.tags
    assert "<script" not in text and bad in "".join(found.texts) and found.tags.count("details") == 3
    assert not re.search(r"https?:|src=|href=|url\(|@import", text)
    assert (tmp_path / "report.md").read_text().count("(examples.html)") == 1


def test_the_page_shows_each_token_with_its_value(tmp_path):
    """Both responses, pi_ref's by the file of values, and what is known of each."""
    session = fill(helpers.session(tmp_path, "collect.eta=0.1"))
    values = measure.read_samples(measure.samples_path(session.workdir, "pi_ref_values", 2))
    report.write(session.workdir)
    found = Page((tmp_path / "examples.html").read_text())
    shown = [a["data-v"] for a in found.attributes if "data-v" in a]
    order = [3, 0, 1]  # the one that guidance solved, and two of those that neither did
    guided = ["0.250", "no value", "0.875"]
    assert shown == sum(([f"{v:.3f}" for v in values[3 * i]["values"]] + guided for i in order), [])
    text = "".join(found.texts)
    assert "1 where only Q# is right (1 shown)" in text and "4 where both are wrong (2 shown)" in text
    assert "answer guided 3 at 0.1; 3 tokens; KL 0.10; value 0.25 at first, 0.88 at last" in text
    shades = [a["class"].split()[1] for a in found.attributes if a.get("data-v") in guided]
    assert shades == ["v5", "none", "v18"] * 3  # of 21, 0 .. 20
    assert text.count("end") >= 6, "the stop token is one of the response's"


def test_shades_go_from_the_least_to_the_greatest():
    assert [page._shade(value, (0.0, 1.0)) for value in (0.0, 0.5, 1.0)] == [0, 10, 20]
    assert [page._shade(value, (-2.0, 2.0)) for value in (-2.0, 0.0, 2.0)] == [0, 10, 20]
    ends = [page._color(share) for share in (0.0, 0.5, 1.0)]
    assert ends == [page._rgb(color) for color in page._ENDS]
    assert len(set(map(page._color, np.arange(21) / 20))) == 21


def test_results_that_are_missing_or_damaged_are_named_with_what_to_run(tmp_path):
    session = helpers.session(tmp_path)
    message = refusal(report.write, session.workdir)
    assert str(session.workdir.results) in message and f"qsharp evaluate --workdir {tmp_path}" in message
    session.workdir.results.write_text(json.dumps(ROWS)[:-20])
    with pytest.raises(UserError, match=f"{session.workdir.results} is damaged.*evaluate again"):
        report.write(session.workdir)
