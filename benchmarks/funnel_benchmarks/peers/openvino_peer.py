"""OpenVINO as a peer, on the CPU: the graph that torch.export makes, with pooling, compiled once."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from funnel_benchmarks.peers import torch_graph
from funnel_benchmarks.peers.batches import embedding

DTYPES = {"bfloat16": "bf16", "float32": "f32"}  # OpenVINO's names


def make(task: dict[str, Any]) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """The call that embeds one of the task's batches, [count, D] float32; see the package about the task."""
    openvino: Any = importlib.import_module("openvino")
    options = {
        "INFERENCE_PRECISION_HINT": DTYPES[task["dtype"]],
        "INFERENCE_NUM_THREADS": task["cores"],
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.convert_model(torch_graph.export(task))
    compiled = openvino.compile_model(model, "CPU", options)
    del model

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return compiled({"ids": ids, "mask": mask})[0]

    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    facts = {
        "openvino": openvino.__version__,
        "dtype": {theirs: ours for ours, theirs in DTYPES.items()}.get(taken, taken),
        "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
    }
    return embedding(task, run), facts
