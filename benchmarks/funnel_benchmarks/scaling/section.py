"""What the report says about a result of `funnel bench scaling`."""

from functools import partial

from funnel_benchmarks.describe import describe_backend, describe_model
from funnel_benchmarks.report.section import Cell, Plot, Section, Table, number, spread
from funnel_benchmarks.results import Row
from funnel_benchmarks.scaling.axes import AXES
from funnel_benchmarks.scaling.plot import draw
from funnel_benchmarks.scaling.slopes import Growth, Slope, growths
from funnel_benchmarks.scaling.table import FLAG, peak_bytes

HOW_TO_READ = (
    "One size grows at a time: tokens of one sequence; sequences in the batch; layers, with the funnel in proportion; "
    "sequences among the same number of tokens. Both engines ran in turns. A broken line is the work, the "
    "floating-point operations, scaled to pass through the last measured point: points above it further to the left "
    "are time that is not spent on the work, such as the cost of a call.",
    "An exponent p says that a quantity grows as the p-th power of another; it is fitted by least squares on "
    "logarithms of medians, and its range is the 95 % confidence interval (Student's t). A cost that grows faster than "
    "its work is one whose exponent over the work has all of its interval above 1.",
    "Threads: the same batch with as many threads for an engine; the line is the work of each thread. Engines: two "
    "calls, by one engine one after the other, or by two at once from two threads.",
    "Memory is the most that was resident while both engines were timed, weights and programs included, and below it "
    "what was resident when timing began; on a device it is the most in use since the program began.",
)
SLOPES = (
    ("axis", "and engine"), ("latency", "exponent of the size"), ("work", "exponent of the size"),
    ("latency over work", "exponent"), ("verdict", ""),
)  # fmt: skip
COLUMNS = (
    ("size", "and batch"), ("with funnel", "ms, quartiles"), ("work", "GFLOP"), ("without", "ms, quartiles"),
    ("work", "GFLOP"), ("ratio", "with / without"), ("memory", "GB, and before"),
)  # fmt: skip


def section(content: Row) -> Section:
    """How each cost grows beside its work, and all figures."""
    rows, grown = content["rows"], list(growths(content["rows"]))
    described = "Latency over each size, a panel for each axis; the table has the same figures."
    caption = "Latency with quartiles over each size, and the work scaled to the last point"
    return Section(
        title=f"How latency grows: {content['options']['model']['name']}",
        summary=summary(rows, grown),
        plots=[Plot(partial(draw, content), described, caption)] if rows else [],
        tables=[
            *([Table("Exponents", SLOPES, [growth_cells(growth) for growth in grown])] if grown else []),
            *([Table("All figures", COLUMNS, [row_cells(row) for row in rows])] if rows else []),
        ],
        reading=HOW_TO_READ,
        facts=facts(content["options"]),
    )


def summary(rows: list[Row], grown: list[Growth]) -> str:
    if not rows:
        return "Nothing was measured."
    if not grown:
        return f"{len(rows)} sizes were measured, too few along one axis for an exponent."
    faster = [f"{growth.axis} ({growth.engine})" for growth in grown if growth.flagged]
    verdict = (
        f"A cost grows faster than its work along {', '.join(faster)}" if faster else f"Nowhere is it sure that {FLAG}"
    )
    slopes = "; ".join(
        f"{growth.axis}: latency grows with the power {growth.seconds.exponent:.2f} of the size, its work with "
        f"{growth.work.exponent:.2f}"
        for growth in grown
        if growth.engine == "with funnel"
    )
    return f"{verdict}. With the funnel, {slopes}."


def growth_cells(growth: Growth) -> tuple[Cell, ...]:
    slopes = growth.seconds, growth.work, growth.seconds_over_work
    return Cell(growth.axis, growth.engine), *map(slope_cell, slopes), Cell(FLAG if growth.flagged else "")


def slope_cell(slope: Slope) -> Cell:
    return Cell(f"{slope.exponent:.2f}", f"{slope.low:.2f} \u2013 {slope.high:.2f}", slope.exponent)


def row_cells(row: Row) -> tuple[Cell, ...]:
    """One row of the table, in the order of `COLUMNS`."""
    return (
        Cell(f"{row['axis']} {row['x']}", f"{row['sequences']} x {row['tokens']} tokens, {row['layers']} layers"),
        spread(row["seconds"], 1e3, ",.1f"),
        number(row["flops"] / 1e9, ",.1f"),
        spread(row["baseline_seconds"], 1e3, ",.1f"),
        number(row["baseline_flops"] / 1e9, ",.1f"),
        number(row["seconds"]["median"] / row["baseline_seconds"]["median"], ".3f"),
        memory_cell(row),
    )


def memory_cell(row: Row) -> Cell:
    peak, before = peak_bytes(row), row["peak_memory_bytes"].get("before")
    if peak is None:
        return Cell("")
    return Cell(f"{peak / 1e9:.2f}", "" if before is None else f"{before / 1e9:.2f}", peak)


def facts(options: Row) -> dict[str, str]:
    runs = f"medians of {2 * options['repeats']} runs; random token ids, seed {options['seed']}"
    return {
        "Model": describe_model(options["model"]),
        "Funnel": options["funnel"]["name"],
        "Axes": "; ".join(f"{axis}: {text}" for axis, text in AXES.items()),
        "Method": f"{options['repeats']} times {options['order']} per row, {runs}",
        "Compilations while timing": "0",
        "Backend": describe_backend(options),
    }
