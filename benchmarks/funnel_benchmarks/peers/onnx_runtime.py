"""ONNX Runtime as a peer, on the CPU: the graph that torch.onnx exports, with pooling.

In float32: it has no product in bfloat16 for x86, and its optimiser for transformers does not know Gemma, so that what
it fuses when a session is made is all there is.
"""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from funnel_benchmarks.peers import torch_graph
from funnel_benchmarks.peers.batches import embedding

DTYPE = "float32"


def make(task: dict[str, Any]) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """The call that embeds one of the task's batches, [count, D] float32; see the package about the task."""
    torch, onnxruntime, _ = map(importlib.import_module, ("torch", "onnxruntime", "onnxscript"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task["cores"]
    with tempfile.TemporaryDirectory() as folder:  # a session has read its files once it is made
        file = Path(folder) / "model.onnx"
        program = torch.onnx.export(torch_graph.export(task), dynamo=True, verbose=False)
        program.save(file, external_data=True)  # one file holds 2 GB at most
        del program
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run(None, {"ids": ids, "mask": mask})[0]

    facts = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "dtype": DTYPE}
    return embedding(task, run), facts | {"threads": options.intra_op_num_threads}
