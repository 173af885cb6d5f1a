"""How the results of the suite `serve-http` read."""

from collections.abc import Callable

from funnel_benchmarks.charts import Chart, Panel, Series
from funnel_benchmarks.describe import describe_backend, describe_machine, describe_model
from funnel_benchmarks.results import Row
from funnel_benchmarks.serve.suite import BASELINE, describe_lengths
from funnel_benchmarks.suite import Cell, Column, Section, Table, field, number

READING = (
    "Capacity is a closed loop: each client sends its next request when it has the reply to its last one. The same "
    "texts go through Engine.embed in this process, in turns with the server, A B B A. The ratio is what HTTP leaves "
    "of the engine's throughput. The tokenizer looks up a word for each token; a real one would take longer on both "
    "sides. Overhead is the latency of one short request over HTTP minus the engine's own time for the same text.",
    "Then requests of one text each arrive as a Poisson process, whatever the server is doing (an open loop). A "
    "latency goes from the arrival that was drawn beforehand to the end of the reply, so waiting counts, also that for "
    "a client that is late. The table has the client's lag, from arrival to sending, and its share of a core: where "
    "they are not small, the client was measured and not the server. Its clock wakes it within about a millisecond.",
    "The client, the server and the engine are processes of their own on one machine. Only one of server and engine "
    "works at a time, but client and server share its cores, so the client takes some throughput from the server.",
    "Shares are of a server's own capacity with requests of one text. A refusal is a status 429, timed from sending. "
    "The peer refuses nothing and lets one request compute at a time. Highest rates are found by halving, down to "
    "steps of 1/32 of the capacity, with one run for each; of n requests n/100 are above p99.",
)


def milliseconds(*path: str) -> Callable[[Row], Cell | None]:
    """The cell of seconds inside a row; empty where the row lacks them."""

    def cell(row: Row) -> Cell | None:
        value = row
        for name in path:
            if name not in value:
                return None
            value = value[name]
        return field("value", ",.2f", 1e3)({"value": value})

    return cell


def name(row: Row) -> Cell:
    return Cell(row["server"], row.get("lengths", ""))


def ratio(row: Row) -> float:
    """Throughput over that of the engine."""
    return float(row["engine_seconds"]["median"] / row["seconds"]["median"])


def describe_statuses(statuses: Row) -> str:
    return ", ".join(f"{count} x {status}" for status, count in statuses.items())


def errors(row: Row) -> int:
    """Requests that were neither answered nor refused."""
    return sum(count for status, count in row["statuses"].items() if status not in ("200", "429"))


CAPACITY = (
    Column("server", name, note="and lengths"),
    Column("requests", lambda row: row["form"]),
    Column("server's", field("texts_per_second", ",.1f"), "texts/s"),
    Column("Engine.embed", field("engine_texts_per_second", ",.1f"), "texts/s"),
    Column("ratio", lambda row: number(ratio(row), ".3f"), note="server / engine"),
)
OVERHEAD = (
    Column("server", name),
    Column("tokens", field("tokens", "d")),
    Column("over HTTP", milliseconds("seconds"), "ms"),
    Column("Engine.embed", milliseconds("engine_seconds"), "ms"),
    Column("overhead", milliseconds("overhead"), "ms"),
)
ARRIVING = (
    Column("server", name, note="and lengths"),
    Column(
        "arrivals/s",
        lambda row: Cell(f"{row['arrivals_per_second']:,.1f}", f"{row['share']} %", row["arrivals_per_second"]),
        note="share of capacity",
    ),
    Column("results/s", field("results_per_second", ",.1f")),
    Column("p50", milliseconds("p50"), "ms"),
    Column("p90", milliseconds("p90"), "ms"),
    Column("p99", milliseconds("p99"), "ms"),
    Column("statuses", lambda row: describe_statuses(row["statuses"])),
    Column("errors", lambda row: number(errors(row), "d")),
    Column("refusals", milliseconds("refusals", "p50"), "ms", "p50"),
    Column("refusals", milliseconds("refusals", "p99"), "ms", "p99"),
    Column("memory", lambda row: memory(row), "GB", "most"),
    Column("client's lag", milliseconds("client", "lag_p99"), "ms", "p99"),
    Column("client", lambda row: number(row["client"]["busy"], ".0f", 100), "%", "of a core"),
)
HIGHEST = (
    Column("server", name, note="and lengths"),
    Column("p99 at most", milliseconds("limit"), "ms"),
    Column("highest rate", field("arrivals_per_second", ",.1f"), "requests/s"),
    Column("no funnel", field("baseline_arrivals_per_second", ",.1f"), "requests/s"),
    Column("ratio", lambda row: number(row["arrivals_per_second"] / row["baseline_arrivals_per_second"], ".2f")),
)
TABLES = {  # by a field that only its rows have
    "form": ("Capacity", CAPACITY),
    "overhead": ("One short request at a time", OVERHEAD),
    "share": ("Requests that arrive by chance", ARRIVING),
    "limit": ("Highest rates at the same p99", HIGHEST),
}


def memory(row: Row) -> Cell | None:
    return number(row["memory"]["most"], ".2f", 1e-9) if row["memory"] else None


def section(content: Row) -> Section:
    """Capacity, overhead, latencies and refusals under load, and highest rates at the same p99."""
    options, rows = content["options"], content["rows"]
    tables = {kind: Table(*head, [row for row in rows if kind in row]) for kind, head in TABLES.items()}
    return Section(
        title=f"Over HTTP: {options['model']['name']}",
        summary=summary(tables["form"].rows, tables["overhead"].rows),
        plots=[chart(content, tables["share"].rows)] if tables["share"].rows else [],
        tables=list(tables.values()),
        reading=READING,
        facts={
            "Model": describe_model(options["model"]),
            "Funnel": options["funnel"]["name"],
            "Requests": f"{options['requests']} of each kind; {'; '.join(map(describe_lengths, options['lengths']))}",
            "Client": "a process of its own, on the same cores as the server",
            "Settings of funnel serve": ", ".join(f"{name} {value}" for name, value in options["settings"].items()),
            "Seeds": ", ".join(f"{name} {seed}" for name, seed in options["seeds"].items()),
            "Backend": describe_backend(options),
        },
    )


def summary(capacities: list[Row], overheads: list[Row]) -> str:
    """What each server keeps of the engine's throughput, and adds to its latency."""
    said = [
        f"{row['lengths']}, {row['server']}: {row['texts_per_second']:,.1f} texts/s as {row['form']}, {ratio(row):.3f} "
        "of Engine.embed"
        for row in capacities
    ]
    said += [
        f"{row['server']}: a short request takes {1e3 * row['overhead']:.2f} ms more than in Engine.embed"
        for row in overheads
    ]
    return "; ".join(said) + "." if said else "Nothing was measured."


def chart(content: Row, rows: list[Row]) -> Chart:
    """Median and 99th percentile of each server, a panel for each kind of requests."""
    panels = []
    looks = {BASELINE: ("ideal", "D"), content["options"]["funnel"]["name"]: ("measured", "o")}
    for kind in dict.fromkeys(row["lengths"] for row in rows):
        series = []
        for server in dict.fromkeys(row["server"] for row in rows):
            mine = [row for row in rows if (row["lengths"], row["server"]) == (kind, server)]
            rates = [row["arrivals_per_second"] for row in mine]
            for percentile, line in (("p50", "-"), ("p99", "--")):
                values = [1e3 * row[percentile] for row in mine]
                series.append(Series(f"{server}, {percentile}", rates, values, *looks.get(server, ("ink", "s")), line))
        panels.append(Panel(series, "arrivals per second", "latency (ms)", kind, log_values=True))
    text = "latency over the rate of arrivals at each server"
    return Chart(
        f"Median and 99th percentile of {text}, a panel for each kind of requests; the table has the same figures.",
        f"Median (solid) and p99 (dashed) of {text}",
        panels,
        facts=(describe_model(content["options"]["model"]), describe_machine(content["machine"])),
    )
