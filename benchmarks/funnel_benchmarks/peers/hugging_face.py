"""Hugging Face's own code as a peer: sentence vectors, the means of the last hidden states.

Those of a Funnel-Transformer are the rows of [CLS].

Ids are on the host, padded beforehand, and vectors come back there; ours packs them within the time that is measured.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from funnel_benchmarks.peers.batches import embedding

# PyTorch's attention as fast as it can be: with a mask, which transformers makes when it is compiled even where it
# hides nothing, PyTorch cannot take its flash kernels.
WITHOUT_MASK = "sdpa_without_mask"
# "frozen": compiled with weights that are constants, which PyTorch packs for oneDNN. "flash": compiled, with the
# kernels of the package flash-attn, which has them for GPUs.
MODES = ("eager", "compiled", "frozen", "flash")
FEW_SHAPES = 4  # of batches; each is compiled by itself, and more of them together, with sizes left open


def make(task: dict[str, Any]) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """The call that embeds one of the task's batches, [count, D] float32.

    Args:
        task: as all peers have it (see the package), `mode`, one of `MODES`, and `device`, "cpu" or "cuda".
            OMP_NUM_THREADS, where it is set, has priority over `cores`.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    device = task["device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise ModuleNotFoundError(name="PyTorch for CUDA")
    use_cores(torch, task["cores"])
    transformers.AttentionInterface.register(WITHOUT_MASK, attention_without_mask)
    lengths = [[len(task["sequences"][number]) for number in numbers] for numbers in task["batches"]]
    attention = fastest_attention(task["checkpoint"], lengths)
    if task["mode"] == "flash":
        importlib.import_module("flash_attn")
        attention = "flash_attention_2"
    model = load_model(task["checkpoint"], getattr(torch, task["dtype"]), attention).to(device)
    if task["mode"] == "frozen":
        inductor: Any = importlib.import_module("torch._inductor.config")
        inductor.freezing = True
    if task["mode"] != "eager":
        make_traceable(model)
        model = torch.compile(model, dynamic=len(shapes(lengths)) > FEW_SHAPES)

    reads_first = model.config.model_type == "funnel"

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            tokens, real = (torch.from_numpy(array).to(device) for array in (ids, mask))
            masked = {} if mask.all() else {"attention_mask": real}  # a user of equal lengths gives none
            rows = model(input_ids=tokens, **masked).last_hidden_state.float()
            if reads_first:
                return rows[:, 0].cpu().numpy()
            if not masked:
                return rows.mean(1).cpu().numpy()
            return ((rows * real[..., None]).sum(1) / real.sum(1, keepdim=True)).cpu().numpy()

    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": task["dtype"],
        "attention": attention,
        "threads": torch.get_num_threads(),
    }
    return embedding(task, run), facts


def shapes(lengths: list[list[int]]) -> set[tuple[int, int]]:
    """Of batches of sequences of these lengths: how many sequences each has, and the longest."""
    return {(len(batch), max(batch)) for batch in lengths}


def fastest_attention(checkpoint: str, lengths: list[list[int]]) -> str:
    """Without a mask, where every batch has sequences of one length, and each token sees all of its own.

    Where each sees those before it, transformers itself makes no mask for sequences of one length.
    """
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    if config.model_type == "funnel":
        return "eager"  # it has no other: its scores are sums of three products
    window = too_far(config)
    equal = all(min(batch) == max(batch) for batch in lengths)
    in_sight = window is None or max(map(max, lengths)) <= window
    return WITHOUT_MASK if equal and in_sight and not is_causal(config) else "sdpa"


def is_causal(config: Any) -> bool:
    """Whether a token sees only those before it, in a model that `load_model` loads."""
    return config.model_type in ("llama", "mistral", "qwen3")


def too_far(config: Any) -> int | None:
    """The least distance at which a sliding layer does not see a token; None: there is no limit."""
    window: int | None = getattr(config, "sliding_window", None)
    if window is not None and config.model_type == "embedding_gemma2_text":  # there the distance may be the window's
        return window + 1
    return window


def use_cores(torch: Any, cores: int) -> None:
    """Sets PyTorch's threads, unless OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)


def load_model(checkpoint: str, dtype: Any, attention: str) -> Any:
    """The encoder, ready to run; bidirectional if it is a Gemma."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(checkpoint, use_cache=False)
    if config.model_type == "gemma":
        config.is_causal = False  # its masks know no other switch; Gemma 3 has one, and with this too a wider window
    return transformers.AutoModel.from_pretrained(
        checkpoint, config=config, dtype=dtype, attn_implementation=attention
    ).eval()


def make_traceable(model: Any) -> None:
    """Gives a Funnel-Transformer the type of attention that computes the same, but does not make shapes from values."""
    if model.config.model_type == "funnel":
        model.config.attention_type = "factorized"


def attention_without_mask(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Any, None]:
    """Full attention of equal sequences; [B, H, T, d] -> [B, T, H, d]."""
    attend = importlib.import_module("torch").nn.functional.scaled_dot_product_attention
    return attend(query, key, value, scale=scaling, enable_gqa=True).transpose(1, 2).contiguous(), None
