"""A result as lines of text, printed while it grows."""

from funnel_benchmarks.results import Row
from funnel_benchmarks.text_table import head_line, table_line

COLUMNS = (("share", 7), ("of", 9), ("ms", 9), ("GFLOP/s", 9), ("GB/s", 7))
LAST_COLUMN = "op; backend"


def introduction(content: Row) -> list[str]:
    """What is about to be measured, and the titles of the columns."""
    return [describe(content["options"]), "", head_line(COLUMNS, LAST_COLUMN)]


def describe(options: Row) -> str:
    lengths = options["lengths"]
    return f"the sizes of {options['model']}; {len(lengths)} x {lengths[0]} tokens, {options['dtype']}"


def row_line(row: Row) -> str:
    cells = (share(row), row["bound"], *rates(row)) if "share" in row else ("", "", *ceiling_rates(row))
    return table_line(COLUMNS, cells, row["cell"] + (f" ({row['about']})" if "about" in row else ""))


def share(row: Row) -> str:
    return f"{row['share']['median']:.2f}"


def rates(row: Row) -> tuple[str, str, str]:
    """Milliseconds, GFLOP/s and GB/s; nothing for what a case has none of."""
    flops, moved = row["flops_per_second"] / 1e9, row["bytes_per_second"] / 1e9
    return f"{1e3 * row['seconds']['median']:,.2f}", f"{flops:,.1f}" if flops else "", f"{moved:,.1f}" if moved else ""


def ceiling_rates(row: Row) -> tuple[str, str, str]:
    rate = f"{row['rate'] / 1e9:,.1f}"
    flops, moved = (rate, "") if row["cell"] == "ceiling: product" else ("", rate)
    return f"{1e3 * row['seconds']['median']:,.2f}", flops, moved
