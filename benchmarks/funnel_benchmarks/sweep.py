"""What the sweeps over all kernels share: a table of what each variant takes on each target."""

import collections
from collections.abc import Mapping
from typing import Any

from funnel_benchmarks.json_lines import document, rounded

Found = Mapping[tuple[str, str], tuple[Any, ...]]  # figures by variant and target


def table_text(head: dict[str, Any], columns: tuple[str, ...], found: Found, problems: Mapping[Any, str]) -> str:
    """The file of a sweep: a line for each variant, with its figures on each target in the order of `columns`.

    Args:
        head: versions and date.
        problems: by variant and target; an empty text is no problem.
    """
    rows: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for (variant, target), figures in found.items():
        rows[variant][target] = rounded(figures)
    texts = [[variant, target, text] for (variant, target), text in problems.items() if text]
    return document(
        {**head, "columns": list(columns), "problems": texts, "rows": [list(entry) for entry in rows.items()]}
    )
