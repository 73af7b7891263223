"""Tables of a report from the rows of `results.json`, in Markdown whose columns also line up as plain text.

A number with its 95% interval is written 0.790 (0.754 .. 0.826).
"""

import html
import re
from collections import defaultdict
from collections.abc import Sequence

from qsharp_jax.algorithms.registry import ALGORITHMS
from qsharp_jax.report.names import GUIDED, NAMES, eta_of, name_of

TERMINAL = 100  # columns of a terminal that tables fit into
COLUMNS = (
    "method", "eta", "round", "problems", "samples", "reward", "95% interval", "KL", "KL truncated", "tokens",
    "finished", "no answer", "tokens/s",
)  # fmt: skip


def how(rows: Sequence[dict]) -> str:
    """Say how the numbers of `table` were computed."""
    no_answer = majority = weighted = ""
    if _have_answers(rows):
        no_answer = " no answer the share without an answer (their reward is 0),"
        majority = " majority_k the reward of their most frequent answer,"
        weighted = ", and weighted_majority_k the reward of the answer with the greatest sum of values"
    return (
        "Reward is the mean reward over problems (each with its samples' mean), with a 95% interval by bootstrap over"
        " problems. KL is the exact KL(pi || pi_ref) summed over a response's tokens, in nats, before top-k, top-p and"
        " greedy truncation, and KL truncated the same after it. Tokens is the mean response length (of all k responses"
        f" in the rows with _k), finished the share of responses that ended with a stop token,{no_answer} and tokens/s"
        " the response tokens per second of wall time, compilation included. pi_ref, top-K is pi_ref truncated to its K"
        " likeliest tokens, as many as the guide scores (generate.top_k_candidates); it shows the effect of this"
        f" truncation alone. pass_k is the best reward of k samples of pi_ref,{majority} best_of_k the reward of the"
        f" sample that the guide values most{weighted}."
    )


def _have_answers(rows: Sequence[dict]) -> bool:
    return any("no_answer" in row for row in rows)


def table(rows: Sequence[dict], *, width: int | None = None) -> str:
    """Make a table of all rows; only the reward has its interval. A task without answers has no column for them.

    The `width` is as in `markdown`.
    """
    ends = ["finished", *(["no_answer"] if _have_answers(rows) else [])]
    lines = [[name for name in COLUMNS if name != "no answer" or "no_answer" in ends]]
    for row in rows:
        answers = row["samples"] if row["kl"] is not None else row["n"]  # the _k lines take k samples for an answer
        lines.append(
            [
                *_who(row),
                str(row["n"]),
                str(row["samples"]),
                f"{row['reward']:.3f}",
                f"{row['reward_low']:.3f} .. {row['reward_high']:.3f}",
                *(_number(row, name) for name in ("kl", "kl_truncated")),
                f"{row['response_tokens']:.1f}",
                *(_number(row, name) for name in ends),
                f"{row['response_tokens'] * answers / max(row['seconds'], 1e-9):.0f}",
            ]
        )
    return markdown(lines, keys=3, width=width)


def _who(row: dict) -> list[str]:
    """Return the cells for method, eta and round."""
    eta = f"{eta_of(row):g}" if row["eta"] is not None or row["method"] in GUIDED else ""
    return [name_of(row), eta, str(row["round"]) if row["round"] else ""]


def _number(row: dict, name: str) -> str:
    return "" if row.get(name) is None else f"{row[name]:.3f}"


def _interval(row: dict, name: str, sign: str = "") -> str:
    """Return a number with its interval; empty if the row has none."""
    if row.get(f"{name}_low") is None:
        return ""
    value, low, high = (f"{row[key]:{sign}.3f}" for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} ({low} .. {high})"


def how_paper(rows: Sequence[dict]) -> str:
    """Say how the numbers of `paper_table` were computed."""
    majority = (
        " maj1@k the reward of the most frequent answer among a problem's k samples (equivalent answers count as one,"
        " ties are averaged),"
    )
    return (
        f"pass@1 is the mean reward,{majority if _have_answers(rows) else ''} KL is in nats per response before"
        " truncation; in parentheses 95% intervals by bootstrap over problems."
    )


def paper_table(rows: Sequence[dict], eta: float, *, width: int | None = None) -> str:
    """Make a table of pi_ref and the learned methods at one eta, in the paper's layout; empty if nothing was learned.

    If the last round was not measured at `eta`, greedy decoding apart, its smallest eta is used. The `width` is as in
    `markdown`.
    """
    final_round = max(row["round"] for row in rows)
    learned = [row for row in rows if row["round"] == final_round > 0 and row["kl"] is not None]
    if not learned:
        return ""
    etas = {eta_of(row) for row in learned if not row["method"].endswith("_greedy")}
    eta = eta if eta in etas else min(etas)
    order = list(NAMES)
    for algorithm in ALGORITHMS.values():
        for mode in algorithm.extra_modes:  # before the algorithm's own, as in the paper
            order.insert(order.index(algorithm.name), order.pop(order.index(mode)))
    chosen = [row for row in rows if row["method"] in ("pi_ref", "pi_ref_top_k")]
    chosen += [row for row in learned if eta_of(row) == eta]
    chosen.sort(key=lambda row: order.index(row["method"]))
    # Majorities over the same number of samples for every method, so that they can be compared.
    sizes = [{int(name[9:]) for name in row if re.fullmatch(r"majority_\d+", name)} for row in chosen]
    sizes = [size for size in sizes if size]  # greedy methods have one sample
    size = max(set.intersection(*sizes), default=0) if sizes else 0
    head = ["method", "pass@1", *([f"maj1@{size}"] if size else []), "KL"]
    names = ["reward", *([f"majority_{size}"] if size else []), "kl"]
    lines = [[name_of(row), *(_interval(row, name) for name in names)] for row in chosen]
    for row, line in zip(chosen, lines, strict=True):
        if row["method"] == "pi_ref":
            line[-1] = "0"
    return f"At eta {eta:g}:\n\n{markdown([head, *lines], width=width)}"


def passes_table(rows: Sequence[dict]) -> str:
    """Make a table of pass@k and maj1@k by k; empty if no method has several samples of a problem."""
    names = {name for row in rows for name in row if re.fullmatch(r"(pass|majority)_\d+", name)} - {"pass_1"}
    if not names:
        return ""
    columns = ["pass_1", *sorted(names, key=lambda name: (name[0] != "p", int(name.partition("_")[2])))]
    head = [name.replace("pass_", "pass@").replace("majority_", "maj1@") for name in columns]
    measured = [row for row in rows if any(name in row for name in columns)]
    lines = [[*_who(row), *(_interval(row, name) for name in columns)] for row in measured]
    return markdown([["method", "eta", "round", *head], *lines])


def intervals_table(rows: Sequence[dict]) -> str:
    """Make a table of the other statistics of responses; empty if there are none."""
    columns = {
        "kl": "KL", "kl_truncated": "KL truncated", "response_tokens": "tokens", "finished": "finished",
        "no_answer": "no answer",
    }  # fmt: skip
    columns = {name: words for name, words in columns.items() if any(name in row for row in rows)}
    measured = [row for row in rows if "kl_low" in row]
    lines = [[*_who(row), *(_interval(row, name) for name in columns)] for row in measured]
    return markdown([["method", "eta", "round", *columns.values()], *lines]) if measured else ""


HOW_FORECAST = (
    "The forecast is computed before any decoding, from the guide's values of held-out rollouts of pi_ref: their mean"
    " reward and KL (nats), each rollout weighted by w(its end) / w(its prompt). The guided policy's tilts telescope to"
    " this weight where the guide's values are consistent from token to token. Power a is the weight to the power a"
    " (`evaluate.power`); a temperature T divides the tilt, so the weight has the power a / T. For best_of_k the KL is"
    " its bound, log k - (k - 1) / k. Decoded is what guided decoding of the test prompts gave. A small gain in the"
    " forecast says that the guide does not tell responses apart; much less reward decoded than forecast, that its"
    " values come late or contradict each other."
)


def forecast_table(forecast: Sequence[dict], rows: Sequence[dict]) -> str:
    """Make a table of the forecast rows beside the results of decoding; empty without a forecast."""
    lines = [["method", "eta", "forecast reward", "forecast KL", "decoded reward", "decoded KL"]]
    latest = max(row["round"] for row in rows)
    decoded = {(name_of(row), row["eta"]): row for row in rows if row["round"] == latest}
    for row in forecast:
        result = decoded.get((name_of(row), row["eta"]), {})
        eta = "" if row["eta"] is None else f"{row['eta']:g}"
        lines.append([name_of(row), eta, *(_number(part, key) for part in (row, result) for key in ("reward", "kl"))])
    return markdown(lines) if forecast else ""


def frontier_lines(rows: Sequence[dict]) -> list[list[str]]:
    """Return the lines of a table of reward against KL, head first: one per method and eta."""
    lines = [["method", "eta", "reward", "minus pi_ref", "KL", "tokens", "finished"]]
    for row in rows:
        method, eta, _ = _who(row)
        cells = [_interval(row, "reward"), _interval(row, "reward_minus_pi_ref", "+"), _interval(row, "kl")]
        lines.append([method, eta, *cells, f"{row['response_tokens']:.1f}", _number(row, "finished")])
    return lines


HOW_DIFFERENCES = (
    "The mean over problems of the difference between two methods on the same problem; in parentheses its 95% interval"
    " by bootstrap over these differences."
)


def differences_table(rows: Sequence[dict]) -> str:
    """Make a table of the paired differences to pi_ref and to the guide's other modes; empty if there are none."""
    others = ["pi_ref", *(mode for algorithm in ALGORITHMS.values() for mode in algorithm.extra_modes)]
    lines, sizes = [], set()
    for row in rows:
        sizes |= {name for name in row if re.fullmatch(rf"majority_\d+_minus_({'|'.join(others)})", name)}
    size = max((int(name.split("_")[1]) for name in sizes), default=0)
    names = ["reward", *([f"majority_{size}"] if size else []), "kl"]
    head = ["difference", "eta", "round", "pass@1", *([f"maj1@{size}"] if size else []), "KL"]
    for other in others:
        for row in rows:
            if f"reward_minus_{other}" in row:
                method, eta, number = _who(row)
                cells = [_interval(row, f"{name}_minus_{other}", "+") for name in names]
                lines.append([f"{method} - {NAMES[other]}", eta, number, *cells])
    return markdown([head, *lines]) if lines else ""


ROLLOUTS = ("round", "rollouts", "reward", "tokens", "finished", "labelled", "varied", "useful rows", "seconds")
HOW_ROLLOUTS = (
    "For each round's rollouts: mean reward, mean tokens per response, share that ended with a stop token, share of"
    " tokens with a label, share of problems whose rollouts have different rewards (`collect.drop_no_variation` drops"
    " the other problems). Useful rows: the share of rows computed by decoding, over all steps, that belonged to a"
    " response. Seconds are wall time, compilation included; those of a process that was stopped before its round was"
    " whole are not known, nor are its rows."
)


def rollouts_table(metrics: list[dict], *, width: int | None = None) -> str:
    """Make a table of each round's rollouts from the lines of metrics.jsonl; empty if there are none.

    The `width` is as in `markdown`.
    A resumed collection has several lines: the last counts all its rollouts, while rows and seconds are summed.
    """
    by_round = defaultdict(list)
    for line in metrics:
        if match := re.fullmatch(r"round (\d+): collect", line.get("phase", "")):
            by_round[int(match[1])].append(line)
    lines = [list(ROLLOUTS)]
    for number, collections in sorted(by_round.items()):
        total, row_steps = collections[-1], sum(line.get("row_steps", 0) for line in collections)
        shares = [f"{total[name]:.3f}" if name in total else "" for name in ("finished", "labelled", "varied")]
        useful = f"{sum(line.get('tokens', 0) for line in collections) / row_steps:.3f}" if row_steps else ""
        seconds = f"{sum(line['seconds'] for line in collections):.0f}"
        whole = [str(number), str(total["rollouts"]), _number(total, "reward"), f"{total['response_tokens']:.1f}"]
        lines.append([*whole, *shares, useful, seconds])
    return markdown(lines, width=width) if by_round else ""


def to_html(lines: Sequence[Sequence[str]]) -> str:
    """Format a table, head first, as HTML."""
    tags = ["th", *["td"] * (len(lines) - 1)]
    rows = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for tag, line in zip(tags, lines, strict=True)
    ]
    return "\n".join(["<table>", *rows, "</table>"])


def markdown(lines: list[list[str]], *, keys: int = 1, width: int | None = None) -> str:
    """Format a table, head first, so that its columns also line up as plain text.

    Args:
      keys: columns that say what a row is about.
      width: of a terminal: columns that do not fit are tables of their own below, which begin with the keys again.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if width is not None:
        parts, of_keys = [[*range(keys)]], sum(widths[:keys]) + 3 * keys + 1
        left = width - of_keys
        for column in range(keys, len(widths)):
            if widths[column] + 3 > left and len(parts[-1]) > keys:
                parts.append([*range(keys)])
                left = width - of_keys
            parts[-1].append(column)
            left -= widths[column] + 3
        return "\n\n".join(markdown([[line[column] for column in part] for line in lines]) for part in parts)
    text = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in text)
