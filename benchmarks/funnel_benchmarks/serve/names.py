"""What the rows of a result are called, and which of them are which."""

from funnel_benchmarks.results import Row

BASELINE = "no funnel"


def offline_name(kind: str) -> str:
    return f"{kind}: offline"


def online_name(kind: str, engine: str, owner: str, share: int) -> str:
    return f"{kind}: {engine} at {share} % of the rate of {owner}"


def offline_rates(offline_row: Row) -> tuple[float, float]:
    """Requests a second without a funnel and with it."""
    return offline_row["baseline_requests_per_second"], offline_row["requests_per_second"]


def online_rows(content: Row) -> list[Row]:
    """The rows of requests that arrived by chance; the others are offline rates."""
    return [row for row in content["rows"] if "latency" in row]
