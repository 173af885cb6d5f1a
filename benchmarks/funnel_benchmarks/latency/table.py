"""A result as lines of text, printed while it grows."""

from funnel_benchmarks.describe import describe_backend, describe_machine, describe_model
from funnel_benchmarks.latency.paper import beside_paper
from funnel_benchmarks.results import Row
from funnel_benchmarks.text_table import head_line, table_line

COLUMNS = (
    ("latency ms", 10), ("quartiles", 19), ("without", 9), ("ratio", 6), ("ideal", 6), ("saving", 7),
    ("efficiency", 10), ("tokens/s", 9), ("GFLOP/s", 8),
)  # fmt: skip
LAST_COLUMN = "funnel; batch"


def introduction(content: Row) -> list[str]:
    """What is about to be measured, and the titles of the columns."""
    options = content["options"]
    return [
        describe_model(options["model"]),
        "; ".join(batch["name"] for batch in options["batches"]),
        f"{describe_machine(content['machine'])}; backend {describe_backend(options)}",
        f"medians of {2 * options['repeats']} runs, funnel and baseline in the order {options['order']}",
        "",
        head_line(COLUMNS, LAST_COLUMN),
    ]


def row_line(row: Row) -> str:
    seconds = row["seconds"]
    cells = (
        f"{1e3 * seconds['median']:,.1f}",
        f"{1e3 * seconds['low']:,.1f} - {1e3 * seconds['high']:,.1f}",
        f"{1e3 * row['baseline_seconds']['median']:,.1f}",
        f"{row['ratio']['median']:.3f}",
        f"{row['ideal_ratio']:.3f}",
        f"{row['saving_percent']:.1f} %",
        f"{row['efficiency']:.3f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['flops_per_second'] / 1e9:,.1f}",
    )
    return table_line(COLUMNS, cells, row["cell"])


def conclusion(content: Row) -> list[str]:
    """What is known once everything has been measured; of nothing, nothing."""
    rows = content["rows"]
    if not rows:
        return []
    waste = max(max(row["padding_waste"], row["baseline_padding_waste"]) for row in rows)
    return [
        "",
        f"compiling took {compile_seconds(rows):.1f} s beforehand; 0 compilations while timing; padding at most "
        f"{100 * waste:.1f} % of rows; peak memory {describe_peak(rows)}",
        *beside_paper(content),
    ]


def compile_seconds(rows: list[Row]) -> float:
    """Of all programs; those without a funnel were compiled once for each batch."""
    baselines = {row["batch"]["name"]: row["baseline_compile_seconds"] for row in rows}
    return sum(baselines.values()) + sum(row["compile_seconds"] for row in rows)


def describe_peak(rows: list[Row]) -> str:
    """The most memory that was in use while any row was measured."""
    owners = {owner: max(row["peak_memory_gb"].get(owner, 0) for row in rows) for owner in rows[-1]["peak_memory_gb"]}
    return ", ".join(f"{owner} {peak:.2f} GB" for owner, peak in owners.items())
