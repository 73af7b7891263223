"""The report of a run: tables, plots and examples, all from the workdir's files, so that it can be written again."""

import json

from qsharp_jax.evaluation import forecast as forecasts
from qsharp_jax.evaluation import measure
from qsharp_jax.report import examples, page, plots, tables
from qsharp_jax.report.names import COLORS, NAMES
from qsharp_jax.report.plots import learning_curve, save_plot, smoothed
from qsharp_jax.report.tables import TERMINAL, markdown, rollouts_table, table
from qsharp_jax.run import config as configs
from qsharp_jax.run import models
from qsharp_jax.run.workdir import Workdir
from qsharp_jax.system.errors import UserError
from qsharp_jax.system.files import write_atomic

__all__ = [
    "COLORS",
    "NAMES",
    "TERMINAL",
    "learning_curve",
    "markdown",
    "read_results",
    "rollouts_table",
    "save_plot",
    "smoothed",
    "table",
    "write",
]


def read_results(workdir: Workdir) -> list[dict]:
    """Read the rows of `results.json`; raises a UserError if the file is missing or damaged."""
    path = workdir.results
    if not path.exists():
        raise UserError(f"{path} does not exist; run `qsharp evaluate --workdir {workdir.path}` first")
    content = path.read_bytes()  # outside `try`: reading from a bucket may raise a ValueError too
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and evaluate again") from None


def write(workdir: Workdir) -> str:
    """Write `report.md`, the plots and `examples.html`, and return the text for the terminal."""
    rows, metrics = read_results(workdir), workdir.read_metrics()
    folder, number = workdir.path, max(row["round"] for row in rows)
    draw = {
        "frontier.png": lambda axes: plots.frontier(axes, rows),
        "rounds.png": lambda axes: plots.rounds(axes, rows),
    }
    scored_path = measure.samples_path(workdir, "pi_ref_values", number)
    scored = measure.read_samples(scored_path) if scored_path.exists() else None
    if scored:
        draw["calibration.png"] = lambda axes: plots.calibration(axes, examples.with_reward(scored))
    chosen = examples.find(workdir, number)
    if chosen:
        draw["lengths.png"] = lambda axes: plots.lengths(axes, chosen.samples)
    if batches := learning_curve(metrics):
        draw["learning.png"] = lambda axes: plots.learning(axes, batches)
    for name, plot in draw.items():
        save_plot(folder / name, plot)
    collected, shown, eta = rollouts_table(metrics), table(rows), configs.kl_weight(workdir.config)
    paper = tables.paper_table(rows, eta)
    passes, intervals = tables.passes_table(rows), tables.intervals_table(rows)
    statistics = "pass@k and maj1@k" if "maj1@" in passes else "pass@k"
    forecast = tables.forecast_table(forecasts.read(workdir, number), rows)
    differences, pairs = tables.differences_table(rows), examples.text(workdir.config.algorithm, chosen)
    parts = [
        f"# {workdir.config.task.name}: {folder.name}",
        *((paper, tables.how_paper(rows), "## All results") if paper else ()),
        shown,
        tables.how(rows),
        *(("## Paired differences", differences, tables.HOW_DIFFERENCES) if differences else ()),
        *((f"## {statistics}, with 95% intervals", passes) if passes else ()),
        *(("## KL, length and ends, with 95% intervals", intervals) if intervals else ()),
        *(("## Forecast and decoding", forecast, tables.HOW_FORECAST) if forecast else ()),
        *(("## Rollouts", collected, tables.HOW_ROLLOUTS) if collected else ()),
        *(f"![{name}]({name})" for name in draw),
        "## Examples, unguided and guided",
        f"```text\n{pairs}\n```",
    ]
    names = ["report.md", "results.json", *draw]
    if chosen:
        tokenizer = models.make_tokenizer(workdir.config, workdir.date)
        write_atomic(folder / "examples.html", page.make(workdir.config.task.name, chosen, scored, tokenizer))
        parts.append("[More of them](examples.html)" + (", each token shaded by the guide's value." if scored else "."))
        names.append("examples.html")
    write_atomic(workdir.report, "\n\n".join(parts) + "\n")
    files = ", ".join(str(folder / name) for name in names)
    narrow = (
        rollouts_table(metrics, width=TERMINAL), tables.paper_table(rows, eta, width=TERMINAL),
        table(rows, width=TERMINAL),
    )  # fmt: skip
    return "\n\n".join(part for part in (*narrow, pairs, f"Files: {files}") if part)
