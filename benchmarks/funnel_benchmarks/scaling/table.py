"""A result as lines of text, printed while it grows."""

from funnel_benchmarks.describe import describe_backend, describe_machine, describe_model
from funnel_benchmarks.results import Row
from funnel_benchmarks.scaling.slopes import Growth, Slope, growths
from funnel_benchmarks.text_table import head_line, table_line

COLUMNS = (
    ("latency ms", 10), ("quartiles", 19), ("GFLOP", 9), ("without", 10), ("quartiles", 19), ("GFLOP", 9),
    ("memory GB", 9),
)  # fmt: skip
LAST_COLUMN = "axis and size"
FLAG = "the cost grows faster than its work"


def introduction(content: Row) -> list[str]:
    """What is about to be measured, and the titles of the columns."""
    options = content["options"]
    return [
        describe_model(options["model"]),
        f"funnel {options['funnel']['name']}, in models of fewer layers in proportion; "
        f"backend {describe_backend(options)}",
        f"{describe_machine(content['machine'])}; medians of {2 * options['repeats']} runs, with the funnel and "
        f"without in the order {options['order']}",
        "",
        head_line(COLUMNS, LAST_COLUMN),
    ]


def row_line(row: Row) -> str:
    peak = peak_bytes(row)
    cells = *timings(row, ""), *timings(row, "baseline_"), "" if peak is None else f"{peak / 1e9:.2f}"
    return table_line(COLUMNS, cells, row["cell"])


def peak_bytes(row: Row) -> int | None:
    """Of the device if it keeps count, else of the process; None if neither is known."""
    peaks: dict[str, int] = row["peak_memory_bytes"]
    return peaks.get("device", peaks.get("process"))


def timings(row: Row, prefix: str) -> tuple[str, ...]:
    low, median, high = (1e3 * row[f"{prefix}seconds"][name] for name in ("low", "median", "high"))
    return f"{median:,.1f}", f"{low:,.1f} - {high:,.1f}", f"{row[f'{prefix}flops'] / 1e9:,.1f}"


def conclusion(content: Row) -> list[str]:
    """The exponents that the rows so far have."""
    lines = [growth_line(growth) for growth in growths(content["rows"])]
    title = "exponents of power laws that fit best, and their 95 % confidence intervals:"
    return ["", title, *lines] if lines else []


def growth_line(growth: Growth) -> str:
    said = (
        f"{growth.axis:<7} {growth.engine:<12} latency {describe_slope(growth.seconds)}, FLOPs "
        f"{describe_slope(growth.work)}; latency over FLOPs {describe_slope(growth.seconds_over_work)}"
    )
    return f"{said}: {FLAG.upper()}" if growth.flagged else said


def describe_slope(slope: Slope) -> str:
    return f"{slope.exponent:.2f} ({slope.low:.2f} to {slope.high:.2f})"
