"""Hugging Face's own code as a peer: sentence vectors, the means of the last hidden states.

Ids are on the host, padded beforehand, and vectors come back there; ours packs them within the time that is measured.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from funnel_benchmarks.accelerator.hugging_face import ATTENTIONS, attention_without_mask

WITHOUT_MASK = ATTENTIONS[0]  # for sequences of equal length
# "frozen": compiled with weights that are constants, which PyTorch packs for oneDNN.
MODES = ("compiled", "frozen", "eager")


def make(task: dict[str, Any]) -> tuple[Callable[[], np.ndarray], Callable[[Any], np.ndarray], dict[str, Any]]:
    """The call that embeds the task's sequences, [B, D] float32.

    Args:
        task: `checkpoint`, a folder; `mode`, one of `MODES`; `attention`, "sdpa" or `WITHOUT_MASK`; `batches`, for each
            the numbers of its sequences; `sequences`, their ids; `cores`, which PyTorch takes unless OMP_NUM_THREADS
            says otherwise.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(task["cores"])
    transformers.AttentionInterface.register(WITHOUT_MASK, attention_without_mask)
    config = transformers.AutoConfig.from_pretrained(task["checkpoint"], use_cache=False)
    config.is_causal = False  # without it a mask that transformers makes for Gemma 1 is causal
    model = transformers.AutoModel.from_pretrained(
        task["checkpoint"], config=config, dtype=torch.bfloat16, attn_implementation=task["attention"]
    ).eval()
    width = config.hidden_size
    if task["mode"] == "frozen":
        inductor: Any = importlib.import_module("torch._inductor.config")
        inductor.freezing = True
    if task["mode"] != "eager":
        model = torch.compile(model, dynamic=False)
    sequences = task["sequences"]
    batches = [(numbers, *padded(torch, [sequences[number] for number in numbers])) for numbers in task["batches"]]

    def embed() -> np.ndarray:
        vectors = np.empty((len(sequences), width), np.float32)
        with torch.no_grad():
            for numbers, ids, mask in batches:
                if mask.all():  # as a user of equal lengths calls it
                    vectors[numbers] = model(input_ids=ids).last_hidden_state.float().mean(1).numpy()
                else:
                    rows = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
                    vectors[numbers] = ((rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()
        return vectors

    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    return embed, np.asarray, facts


def padded(torch: Any, sequences: list[list[int]]) -> tuple[Any, Any]:
    """Ids and mask of one batch, [B, longest] int64 each; padding is at the end."""
    longest = max(map(len, sequences))
    ids, mask = torch.zeros(len(sequences), longest, dtype=torch.int64), torch.zeros(len(sequences), longest).long()
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def make_batches(lengths: np.ndarray, order: str, size: int) -> list[list[int]]:
    """The numbers of the sequences in each padded batch.

    Args:
        lengths: [B], in tokens.
        order: "equal" makes one batch; "sorted" has batches of `size`, longest sequences first, as
            sentence-transformers makes them; "unsorted" takes them as they come.
    """
    if order == "equal":
        return [list(range(len(lengths)))]
    numbers = np.argsort(-lengths, kind="stable") if order == "sorted" else np.arange(len(lengths))
    return [numbers[start : start + size].tolist() for start in range(0, len(numbers), size)]
