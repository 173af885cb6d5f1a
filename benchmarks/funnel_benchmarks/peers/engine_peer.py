"""The engine itself as a peer, in bfloat16, beside the one in int8 that is measured."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from funnel_engine import Engine, convert


def make(task: dict[str, Any]) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """The call that embeds one of the task's batches, [count, D] float32; see the package about the task."""
    with tempfile.TemporaryDirectory() as folder:  # mapped files stay after their names
        converted = Path(folder) / "converted"
        convert(task["checkpoint"], converted, dtype=task["dtype"])
        engine = Engine.load(converted)
    batches = [[task["sequences"][number] for number in numbers] for numbers in task["batches"]]
    return lambda part: engine.embed(batches[part], normalize=False), {"dtype": task["dtype"]}
