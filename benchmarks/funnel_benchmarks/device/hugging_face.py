"""Times Hugging Face's Gemma: a script of its own, which imports PyTorch and nothing of this project.

    python hugging_face.py TASK

TASK is JSON: `attention` (one of `ATTENTIONS`), `device`, `dtype`, `sequences`, `tokens`, `samples`, and `config`, what
GemmaConfig takes. The last line of the output is JSON too: `samples` in seconds and `versions`, or `left_out`, why not.
"""

import importlib
import json
import sys
import time
from typing import Any

# The first is PyTorch's attention as fast as it can be: with a mask, which transformers makes when it is compiled even
# where it hides nothing, PyTorch cannot take its flash kernels. The others are what transformers calls so.
ATTENTIONS = ("sdpa_without_mask", "sdpa", "flash_attention_2")
WARM_UPS = 3


def main() -> None:
    task = json.loads(sys.argv[1])
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        if task["attention"] == "flash_attention_2":
            importlib.import_module("flash_attn")
    except ImportError as error:
        print(json.dumps({"left_out": f"{error.name} is not installed"}))
        return
    if task["device"] == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"left_out": "PyTorch sees no GPU here"}))
        return
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"samples": measure(torch, transformers, task), "versions": versions}))


def measure(torch: Any, transformers: Any, task: dict[str, Any]) -> list[float]:
    """Seconds of each of `samples` forward passes, from ids on the device to sentence vectors on the host."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, task["dtype"]))
    with torch.device(task["device"]):
        model = make_model(transformers, task)
        ids = torch.randint(0, model.config.vocab_size, (task["sequences"], task["tokens"]))
    compiled = torch.compile(model, dynamic=False)

    def seconds() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            compiled(input_ids=ids).last_hidden_state.float().mean(1).cpu()  # waits for the device
        return time.perf_counter() - start

    for _ in range(WARM_UPS):
        seconds()
    return [seconds() for _ in range(task["samples"])]


def make_model(transformers: Any, task: dict[str, Any]) -> Any:
    """A bidirectional Gemma with random weights, as PyTorch's defaults for dtype and device are."""
    if task["attention"] == ATTENTIONS[0]:
        transformers.AttentionInterface.register(ATTENTIONS[0], attention_without_mask)
    config = transformers.GemmaConfig(
        **task["config"], use_bidirectional_attention=True, use_cache=False, attn_implementation=task["attention"]
    )
    config.is_causal = False  # without it a mask that transformers makes is causal, and compiled it always makes one
    return transformers.GemmaModel(config).eval()


def attention_without_mask(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Any, None]:
    """Full attention of equal sequences; [B, H, T, d] -> [B, T, H, d]."""
    attend = importlib.import_module("torch").nn.functional.scaled_dot_product_attention
    return attend(query, key, value, scale=scaling, enable_gqa=True).transpose(1, 2).contiguous(), None


if __name__ == "__main__":
    main()
