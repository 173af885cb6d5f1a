"""An encoder for MTEB, the Massive Text Embedding Benchmark.

encoder = FunnelEncoder("my-gemma", funnel="6:2/mean")
results = mteb.evaluate(encoder, mteb.get_tasks(tasks=["STSBenchmark"]))
"""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from funnel_serving.adapters.embedder import Embedder, fill_empty, not_installed
from funnel_serving.engines import fingerprint

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
except ModuleNotFoundError as error:
    raise not_installed("mteb", error) from error


class FunnelEncoder(AbsEncoder):
    """Embeds MTEB's texts in this process; texts that are too long are cut, as other models of MTEB do it.

    MTEB returns stored results for a model with the same name, revision and `experiment_kwargs`. Here these are the
    folder's name, the SHA-256 of the checkpoint's manifest, and all else that changes a vector: the funnel that runs,
    the dtype and the other options. So results of one funnel are never returned for another.

    Args:
        checkpoint: a folder that `convert` wrote.
        name: "organisation/model", the name of the stored results. Default: "funnel-engine/" and the folder's name.
        options: further arguments of `Embedder`.
    """

    def __init__(self, checkpoint: str | PathLike[str], *, name: str | None = None, **options: Any):
        self.embedder = Embedder(checkpoint, **{"truncate": True} | options)
        engine = self.embedder.engine
        self.model_prompts = engine.text.prompts
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name or f"funnel-engine/{Path(checkpoint).resolve().name}",
                "revision": fingerprint(checkpoint),
                "max_tokens": engine.max_length,
                "embed_dim": self.embedder.truncate_dim or engine.embedding_size,
                "similarity_fn_name": ScoringFunction.COSINE,
                "experiment_kwargs": options | {"funnel": str(engine.funnel), "activations": str(engine.activations)},
            }
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray:
        """The vectors of a task's texts, [texts, dimensions] float32.

        The prompt is the one of the checkpoint that is named for the task, for its type, or for queries or documents.
        """
        texts = fill_empty([text for batch in inputs for text in batch["text"]])
        return self.embedder.embed(texts, self.get_prompt_name(task_metadata, prompt_type))
