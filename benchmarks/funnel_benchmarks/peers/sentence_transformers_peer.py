"""sentence-transformers as a peer: `encode`, from texts to vectors on the host, as its users call it.

A batch is padded there. Its tokenizer's part is small, a look-up for each word.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from funnel_benchmarks.peers.hugging_face import use_cores
from funnel_benchmarks.peers.sentence_model import text_of


def make(task: dict[str, Any]) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """The call that embeds one of the task's batches, [count, D] float32, of length 1 after the model's heads.

    Args:
        task: as all peers have it (see the package); `checkpoint` is a folder of `write_sentence_model`.
            OMP_NUM_THREADS, where it is set, stands for `cores`.
    """
    torch, transformers, library = map(importlib.import_module, ("torch", "transformers", "sentence_transformers"))
    use_cores(torch, task["cores"])
    dtype = getattr(torch, task["dtype"])
    model = library.SentenceTransformer(task["checkpoint"], device="cpu", model_kwargs={"dtype": dtype})
    batches = [[text_of(task["sequences"][number]) for number in numbers] for numbers in task["batches"]]
    facts = {
        "sentence-transformers": library.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": task["dtype"],
        "threads": torch.get_num_threads(),
    }

    def embed(part: int) -> np.ndarray:
        texts = batches[part]
        rows: np.ndarray = model.encode(texts, batch_size=len(texts), show_progress_bar=False)
        return rows

    return embed, facts
