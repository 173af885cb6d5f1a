"""What the report says of a result: the share of this machine's ceilings that each op reaches."""

from typing import TYPE_CHECKING

from funnel_benchmarks.kernels.table import describe, rates, share
from funnel_benchmarks.plot_style import Look, whiskers
from funnel_benchmarks.report.section import Cell, Plot, Section, Table, number, spread
from funnel_benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    ("op", "and backend"), ("share", "quartiles"), ("bound by", ""), ("time", "ms"), ("GFLOP/s", ""), ("GB/s", ""),
)  # fmt: skip
CEILING_COLUMNS = (("ceiling", ""), ("what", ""), ("rate", "GFLOP/s or GB/s"))
READING = (
    "The ceilings are what this machine can do at best: a large matrix product by the best library there is, with its "
    "weight laid out beforehand, and a copy of memory that no cache holds, in bytes read and written.",
    "Share is the time that an op's work takes at the rate of the ceiling that bounds it, over the time that it does "
    "take: 1 means as fast as can be. Its samples and the ceiling's took turns (A B B A); the range is that of the "
    "quartiles. Above 1 an op runs at a better rate than the ceiling, because its arrays stay in a cache, or by noise.",
    "Each op is a program of its own. On a CPU its result lies in memory that has been used before, as inside a model. "
    "Row-wise ops have so many rows that no cache holds them. embed is a whole forward pass, from token ids on "
    "the host to vectors on the host.",
)


def section(content: Row) -> Section:
    ceilings = [row for row in content["rows"] if "share" not in row]
    rows = [row for row in content["rows"] if "share" in row]
    return Section(
        title=f"Kernels: {content['options']['model']}",
        summary=summary(rows),
        plots=[plot(rows, bound) for bound in ("product", "copy") if any(row["bound"] == bound for row in rows)],
        tables=[
            Table("Ceilings", CEILING_COLUMNS, [ceiling_cells(row) for row in ceilings]),
            Table("Ops", COLUMNS, [cells(row) for row in rows]),
        ],
        reading=READING,
        facts={"Sizes": describe(content["options"]), "Repeats": f"{content['options']['repeats']} times A B B A"},
    )


def summary(rows: list[Row]) -> str:
    """The whole forward pass by each backend, if it is there."""
    whole = [f"{share(row)} with {row['backend']}" for row in rows if row["case"].startswith("embed")]
    return f"A whole forward pass reaches {' and '.join(whole)} of the rate of a bare matrix product." if whole else ""


def plot(rows: list[Row], bound: str) -> Plot:
    mine = [row for row in rows if row["bound"] == bound]
    words = "; ".join(f"{row['cell']}: {share(row)}" for row in mine)
    ceiling = {"product": "a large matrix product", "copy": "a copy of memory"}[bound]
    return Plot(
        draw=lambda look: draw(mine, look),
        described=f"Share of the rate of {ceiling} that each op reaches: {words}.",
        caption=f"Share of the rate of {ceiling}, with quartiles; the dashed line is that ceiling.",
    )


def draw(rows: list[Row], look: Look) -> "Figure":
    """A dot for each op and backend, with whiskers, and a line at 1."""
    from matplotlib.figure import Figure  # an optional dependency that takes a second

    cases = list(dict.fromkeys(row["case"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure = Figure(figsize=(look.inches[0], 1.3 + 0.55 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for index, backend in enumerate(backends):
        mine = [row for row in rows if row["backend"] == backend]
        median, errors = whiskers(row["share"] for row in mine)
        marks = axes.errorbar(
            median, [cases.index(row["case"]) + 0.18 * (index - (len(backends) - 1) / 2) for row in mine],
            xerr=errors, label=backend, linestyle="none", capsize=3, markersize=7,
            marker="osD^v"[index % 5], color=(look.measured, look.ideal, look.ink)[index % 3],
        )  # fmt: skip
        marks.lines[0].set_gid(f"marks-{backend}")
    axes.axvline(1.0, color=look.ink, linewidth=1, linestyle="--", gid="marks-ceiling")
    axes.set_yticks(range(len(cases)), [label(case) for case in cases])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the ceiling")
    if len(backends) > 1:
        figure.legend(loc="outside upper right", ncols=len(backends))
    return figure


def label(case: str) -> str:
    """The name of a case in two lines: the op, and its sizes."""
    op, _, sizes = case.rpartition(", ")
    return f"{op}\n{sizes}"


def ceiling_cells(row: Row) -> tuple[Cell, ...]:
    return Cell(row["cell"].removeprefix("ceiling: ")), Cell(row["about"]), number(row["rate"] / 1e9, ",.1f")


def cells(row: Row) -> tuple[Cell, ...]:
    """One row of the table, in the order of `COLUMNS`."""
    milliseconds, flops, moved = rates(row)
    return (
        Cell(row["case"], row["backend"]),
        spread(row["share"], 1, ".2f"),
        Cell(row["bound"]),
        Cell(milliseconds, value=row["seconds"]["median"]),
        Cell(flops, value=row["flops_per_second"]),
        Cell(moved, value=row["bytes_per_second"]),
    )
