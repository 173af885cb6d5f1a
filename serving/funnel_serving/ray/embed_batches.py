"""Embeds batches of a `ray.data` data set, or of anything else that has batches as Arrow tables.

import ray
from funnel_serving.ray.embed_batches import EmbedBatches

vectors = ray.data.read_parquet("corpus").map_batches(
    EmbedBatches,
    fn_constructor_kwargs={"checkpoint": "my-gemma", "id_column": "id", "text_column": "text"},
    batch_format="pyarrow", batch_size=4096, num_cpus=8,
    compute=ray.data.ActorPoolStrategy(size=4),
)
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray


class EmbedBatches:
    """A worker that loads a checkpoint once and embeds Arrow tables.

    A table has a row with an id and a text; the result has a row for each in the same order, with the columns "id",
    "embedding" (a list of fixed size of float32) and "error". A text that the engine refuses has nulls as its
    embedding, and "error" says why; it does not end the job.

    The engine runs on the accelerators that Ray gave this worker, else on the CPU with as many threads as it has CPUs.

    Args:
        checkpoint: a folder that `convert` wrote, at the same place on every node.
        id_column, text_column: names of the columns.
        prompt_name, truncate, truncate_dim: as in `Engine.embed`.
        funnel: the short form, e.g. "6:2/mean" or "none"; None takes the checkpoint's own.
        options: further arguments of `Engine.load`.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        id_column: str = "id",
        text_column: str = "text",
        prompt_name: str | None = None,
        truncate: bool = False,
        truncate_dim: int | None = None,
        funnel: str | None = None,
        **options: Any,
    ):
        threads = use_assigned_devices()
        from funnel_serving.engines import shared_engine  # imports JAX, which now sees only the devices of this worker

        self.engine = shared_engine(checkpoint, funnel=funnel, **{"threads": threads} | options)
        self.engine.text.prompt(prompt_name)  # raises InputError if it does not exist
        self.id_column, self.text_column = id_column, text_column
        self.prompt_name, self.truncate, self.truncate_dim = prompt_name, truncate, truncate_dim

    def __call__(self, batch: pa.Table) -> pa.Table:
        texts = batch.column(self.text_column).to_pylist()
        errors = self.refusals(texts)
        good = np.array([error is None for error in errors], bool)
        vectors = np.zeros((len(texts), self.truncate_dim or self.engine.embedding_size), np.float32)
        if good.any():
            ids = self.token_ids([text for text, error in zip(texts, errors, strict=True) if error is None])
            vectors[good] = self.engine.embed(ids, truncate_dim=self.truncate_dim)
        # Nulls in the lists, and not in their place: pyarrow cannot read null lists of fixed size from Parquet.
        numbers = pa.array(vectors.reshape(-1), mask=np.repeat(~good, vectors.shape[1]))
        embedding = pa.FixedSizeListArray.from_arrays(numbers, vectors.shape[1])
        columns = {"id": batch.column(self.id_column), "embedding": embedding, "error": pa.array(errors, pa.string())}
        return pa.table(columns)

    def token_ids(self, texts: Sequence[str]) -> Any:
        return self.engine.token_ids(texts, prompt_name=self.prompt_name, truncate=self.truncate)

    def refusals(self, texts: Sequence[Any]) -> list[str | None]:
        """Why the engine refuses each text; None if it does not."""
        from funnel_kernels.errors import InputError

        def refusal(text: Any) -> str | None:
            if not isinstance(text, str):
                return "the text is missing" if text is None else f"{text!r:.40} is not a text"
            try:
                self.token_ids([text])
            except InputError as error:
                return re.sub("^input 0", "the text", str(error))
            return None

        try:
            if all(isinstance(text, str) for text in texts):
                self.token_ids(texts)
                return [None] * len(texts)
        except InputError:
            pass  # of one text or more: which?
        return [refusal(text) for text in texts]


def use_assigned_devices() -> int | None:
    """Makes JAX see what Ray gave this worker. Returns its number of CPUs; None outside of a worker.

    Must run before JAX looks for devices. Variables that the runtime environment of the worker sets are kept.
    """
    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return None
    assigned = ray.get_runtime_context().get_assigned_resources()
    gpus = assigned.get("GPU", 0)
    if not gpus and not assigned.get("TPU"):
        # Else JAX takes the memory of a GPU that belongs to others.
        platforms = os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if "jax" in sys.modules:  # it has read the variable already
            sys.modules["jax"].config.update("jax_platforms", platforms)
    if 0 < gpus < 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 * gpus:.3f}")
    return max(1, int(assigned.get("CPU", 1)))
