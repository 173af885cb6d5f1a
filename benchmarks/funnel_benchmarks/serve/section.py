"""What the report says about a result of `funnel bench serve`."""

from functools import partial

from funnel_benchmarks.describe import describe_backend, describe_model
from funnel_benchmarks.report.section import Cell, Plot, Section, Table, number
from funnel_benchmarks.results import Row
from funnel_benchmarks.serve.plot import draw, online_rows
from funnel_benchmarks.serve.suite import BASELINE, offline_rates
from funnel_benchmarks.serve.table import describe_lengths

HEADLINE_SHARE = 80  # per cent of the rate without a funnel

HOW_TO_READ = (
    "Each request is one sequence. Requests arrive as a Poisson process: at random times that were drawn beforehand "
    "and do not wait for the engine (an open loop). One loop serves them: it embeds what waits, in order of arrival, "
    "as much at once as a batch holds, and goes on with what has arrived by then. Latency is from a request's arrival "
    "to its vector, so waiting counts. Both engines see the same requests at the same times.",
    "The offline rate is that of all requests being there from the beginning, in full batches (two runs of each "
    "engine, in the order A B B A). Rates of arrival are shares of it; dotted lines in the picture stand at both. Near "
    "its offline rate an engine's queue grows long, and a small difference in speed becomes a large one in latency.",
    "A percentile of n latencies is only as good as n: above p99 of 1000 lie ten requests, which tend to have waited "
    "in the same queue. Mean batches say how much an engine found waiting each time; busy is the share of time that "
    "it worked.",
)


def section(content: Row) -> Section:
    """Latencies at a common rate, offline rates, and all figures."""
    online = online_rows(content)
    offline = [row for row in content["rows"] if "latency" not in row]
    return Section(
        title=f"Requests that arrive by chance: {content['options']['model']['name']}",
        summary=summary(offline, online),
        plots=[plot(content)] if online else [],
        tables=[
            *([offline_table(offline)] if offline else []),
            *([online_table(online, content["options"]["requests"])] if online else []),
        ],
        reading=HOW_TO_READ,
        facts=facts(content["options"]),
    )


def plot(content: Row) -> Plot:
    requests = content["options"]["requests"]
    return Plot(
        partial(draw, content),
        "Median and 99th percentile of latency over the rate of arrivals, a panel for each kind of requests; the table "
        "has the same figures.",
        f"Median latency (solid) and p99 of {requests} (dashed) over the rate of arrivals; dotted: offline rates",
    )


def summary(offline: list[Row], online: list[Row]) -> str:
    """For each kind of requests what both engines do at one rate, and what they can do at most."""
    if not offline:
        return "Nothing was measured."
    return " ".join(
        kind_summary(row, [each for each in online if each["lengths"] == row["lengths"]]) for row in offline
    )


def kind_summary(offline: Row, online: list[Row]) -> str:
    without, funneled = offline_rates(offline)
    text = f"{offline['lengths']}: {funneled:,.1f} requests a second with the funnel, {without:,.1f} without"
    rate = offline["lengths"], HEADLINE_SHARE, BASELINE
    common = [row for row in online if (row["lengths"], row["share"], row["share_of"]) == rate]
    if len(common) == 2:
        baseline, funnel = sorted(common, key=lambda row: row["engine"] != BASELINE)
        text += (
            f"; at {baseline['arrivals_per_second']:,.1f} arrivals a second p99 of {baseline['requests']} is "
            f"{1e3 * funnel['p99']:,.0f} ms with it, {1e3 * baseline['p99']:,.0f} ms without"
        )
    return f"{text}."


def offline_table(rows: list[Row]) -> Table:
    columns = ("requests", ""), ("with funnel", "requests/s"), ("without", "requests/s"), ("ratio", "with / without")
    return Table("Offline rates", columns, [offline_cells(row) for row in rows])


def offline_cells(row: Row) -> tuple[Cell, ...]:
    without, funneled = offline_rates(row)
    return (
        Cell(row["lengths"]),
        number(funneled, ",.1f"),
        number(without, ",.1f"),
        number(funneled / without, ".2f"),
    )


def online_table(rows: list[Row], requests: int) -> Table:
    columns = (
        ("engine", "and requests"), ("arrivals/s", "share of a rate"), ("p50", "ms"), ("p90", "ms"),
        (f"p99 of {requests}", "ms"), ("quartiles", "ms"), ("batch", "sequences"), ("batch", "tokens"), ("busy", "%"),
    )  # fmt: skip
    return Table("Requests that arrive by chance", columns, [online_cells(row) for row in rows])


def online_cells(row: Row) -> tuple[Cell, ...]:
    rate, batch, latency = row["arrivals_per_second"], row["mean_batch"], row["latency"]
    return (
        Cell(row["engine"], row["lengths"]),
        Cell(f"{rate:,.1f}", f"{row['share']} % of {row['share_of']}", rate),
        *(number(1e3 * row[name], ",.1f") for name in ("p50", "p90", "p99")),
        Cell(f"{1e3 * latency['low']:,.1f} \u2013 {1e3 * latency['high']:,.1f}", value=latency["low"]),
        number(batch["sequences"], ",.1f"),
        number(batch["tokens"], ",.0f"),
        number(100 * row["busy"], ".0f"),
    )


def facts(options: Row) -> dict[str, str]:
    return {
        "Model": describe_model(options["model"]),
        "Funnel": options["funnel"]["name"],
        "Requests": f"{options['requests']} of each kind; {'; '.join(map(describe_lengths, options['lengths']))}",
        "Batches": f"at most {options['max_batch_tokens']} tokens",
        "Seeds": ", ".join(f"{name} {seed}" for name, seed in options["seeds"].items()),
        "Compilations while timing": "0",
        "Backend": describe_backend(options),
    }
