"""A result as lines of text, printed while it grows."""

from funnel_benchmarks.results import Row


def introduction(content: Row) -> list[str]:
    """What is about to be measured."""
    options = content["options"]
    return [
        describe_model(options),
        *(describe_lengths(name, facts) for name, facts in options["lengths"].items()),
        f"medians of {2 * options['repeats']} runs of each side, or of each sequence",
        "each peer compiles first, which takes up to minutes",
        "",
    ]


def describe_model(options: Row) -> str:
    layers = "all" if options["depth"] is None else options["depth"]
    return f"{options['preset']}, {layers} layers, {options['dtype']}, random weights; backend {options['backend']}"


def describe_lengths(name: str, facts: Row) -> str:
    span = f"{facts['shortest']} to {facts['longest']}" if facts["shortest"] < facts["longest"] else facts["longest"]
    return f"{name}: {facts['sequences']} sequences of {span} tokens, {facts['tokens']:,} in all"


def row_line(row: Row) -> str:
    """How many times as fast ours is; the two latencies, and of single sequences what nine in ten stay below."""
    low, median, high = (row["speedup"][name] for name in ("low", "median", "high"))
    ours, theirs = milliseconds(row, ""), f"{milliseconds(row, 'peer_')} in {row['facts']['dtype']}"
    return f"{median:6.2f} times ({low:.2f} - {high:.2f}): {ours} against {theirs}  {row['cell']}"


def milliseconds(row: Row, whose: str) -> str:
    median = f"{1e3 * row[f'{whose}seconds']['median']:,.1f} ms"
    return f"{median} (p90 {1e3 * row[f'{whose}p90']:,.1f})" if row["scenario"] == "one" else median
