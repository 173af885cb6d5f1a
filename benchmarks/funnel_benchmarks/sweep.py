"""What the sweeps over all kernels share: the shapes of the presets, progress, and a table of what each variant takes.

A sweep compiles *variants* (kernels with all that is fixed at compilation) for *targets* that need not be here, in
processes of their own, and names every problem.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from funnel_benchmarks.json_lines import document, rounded
from funnel_benchmarks.suite_command import screen
from funnel_engine import ModelConfig, preset
from funnel_engine.output_files import write_text
from funnel_engine.presets import PRESETS

Item = TypeVar("Item")
Place = tuple[str, str]  # a variant and a target

json_option = click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="File to write."
)

only_option = click.option(
    "--only", multiple=True, help="Only variants whose name begins so, e.g. pool_norm. Can be given several times."
)


def configs() -> list[ModelConfig]:
    return [preset(name) for name in PRESETS]


def attention_shapes() -> list[tuple[int, int, int, float, float]]:
    """Heads, key/value heads, head dim, scale and softcap of all layers of all presets; a softcap of 0 is none.

    Heads wider than 256 are left out: the kernels refuse them, and XLA serves them.
    """
    shapes = {(*c.heads(kind), c.query_scale, c.softcap or 0.0) for c in configs() for kind in set(c.layer_types)}
    return sorted(shape for shape in shapes if shape[2] <= 256)


def widths() -> list[int]:
    """Model widths of all presets."""
    return sorted({config.hidden_size for config in configs()})


def with_bar(what: str, items: Iterable[Item], total: int | None = None) -> Iterable[Item]:
    """The items one by one, with a bar for them where standard error is a terminal."""
    console = Console(stderr=True)
    return track(items, what, total, console=console, transient=True, disable=not console.is_terminal)


def table_text(
    head: dict[str, Any], columns: Sequence[str], found: Mapping[Place, Sequence[Any]], problems: Mapping[Place, str]
) -> str:
    """The file of a sweep: a line for each variant, with its figures on each target in the order of `columns`."""
    rows: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for (variant, target), figures in found.items():
        rows[variant][target] = rounded(figures)
    texts = [[variant, target, text] for (variant, target), text in problems.items() if text]
    return document({**head, "columns": list(columns), "problems": texts, "rows": list(map(list, rows.items()))})


def finish(
    json_file: Path | None,
    text: Callable[[], str],
    tables: Iterable[Table],
    problems: Mapping[Place, str],
    fatal: Callable[[str], bool] = lambda target: True,
) -> None:
    """Writes the file, prints tables and every problem. Exit status 1: a target for which problems are fatal has one.

    Args:
        problems: by variant and target; an empty text means that there is none.
    """
    if json_file:
        write_text(json_file, text())
    for table in tables:
        if table.row_count:
            screen().print(table)
    named = {place: problem for place, problem in problems.items() if problem}
    for (variant, target), problem in named.items():
        click.echo(f"{target}: {variant}: {problem}")
    if any(fatal(target) for _, target in named):
        raise SystemExit(1)
