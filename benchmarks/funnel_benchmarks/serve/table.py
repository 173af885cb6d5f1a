"""A result as lines of text, printed while it grows."""

from funnel_benchmarks.describe import describe_backend, describe_machine, describe_model
from funnel_benchmarks.results import Row
from funnel_benchmarks.serve.suite import SHARES, offline_rates
from funnel_benchmarks.text_table import head_line, table_line

COLUMNS = (
    ("requests/s", 10), ("p50 ms", 9), ("p90 ms", 9), ("p99 ms", 9), ("sequences", 9), ("tokens", 7), ("busy", 5),
)  # fmt: skip
LAST_COLUMN = "engine and rate"


def introduction(content: Row) -> list[str]:
    """What is about to be measured, and the titles of the columns."""
    options = content["options"]
    return [
        describe_model(options["model"]),
        f"{describe_machine(content['machine'])}; backend {describe_backend(options)}",
        *(describe_lengths(facts) for facts in options["lengths"]),
        f"{options['requests']} requests in each line, so p99 is p99 of {options['requests']}; batches of at most "
        f"{options['max_batch_tokens']} tokens; sequences and tokens are means of a batch",
        "compiling comes first, and takes up to minutes; a line takes the number of requests over their rate, which is "
        "told as soon as it is known",
        "",
        head_line(COLUMNS, LAST_COLUMN),
    ]


def describe_lengths(facts: Row) -> str:
    return f"{facts['source']}: {facts['shortest']} to {facts['longest']} tokens, median {facts['median']:g}"


def row_line(row: Row) -> str:
    if "latency" not in row:
        return offline_line(row)
    cells = (
        f"{row['arrivals_per_second']:,.1f}",
        *(f"{1e3 * row[name]:,.1f}" for name in ("p50", "p90", "p99")),
        f"{row['mean_batch']['sequences']:,.1f}",
        f"{row['mean_batch']['tokens']:,.0f}",
        f"{100 * row['busy']:.0f} %",
    )
    return table_line(COLUMNS, cells, row["cell"])


def offline_line(row: Row) -> str:
    """Both offline rates, and how long each kind of line below will take by them."""
    without, funneled = offline_rates(row)
    count = row["baseline_seconds"]["median"] * without
    times = [", ".join(f"{100 * count / (share * rate):,.0f} s" for share in SHARES) for rate in (without, funneled)]
    return (
        f"{row['cell']}: {without:,.1f} requests/s without a funnel, {funneled:,.1f} with it; "
        f"{', '.join(map(str, SHARES))} % of these take {times[0]}, and {times[1]}"
    )
