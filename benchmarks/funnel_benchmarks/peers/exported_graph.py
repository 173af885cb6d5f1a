"""The encoder of Hugging Face as a graph with batch size and length left open, for ONNX Runtime and OpenVINO.

The layers are those of transformers. Two things that they are given are made here, because of what run-times do:

- Masks: those of transformers leave padding that no real token is near with nothing to see, and the answer may be NaN.
- Angles of positions: looked up. A run-time that computes in bfloat16 would compute them in it, and bfloat16 does not
  know the integers beyond 256.
"""

import importlib
from typing import Any

from funnel_benchmarks.peers.batches import padded
from funnel_benchmarks.peers.hugging_face import is_causal, load_model, make_traceable, too_far

NAMES = ("cosines", "sines")
TWO_ROPES = ("gemma3_text", "embedding_gemma2_text")  # one for each kind of layer


def export(task: dict[str, Any]) -> Any:
    """A `torch.export.ExportedProgram`: `ids` and `mask`, [B, T] int64 each -> means of the last hidden states, [B, D].

    Args:
        task: as all peers have it (see the package). The weights become float32, and no sequence may be longer than
            those of the task.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    if transformers.AutoConfig.from_pretrained(task["checkpoint"]).model_type == "funnel":
        return export_funnel_transformer(torch, task)
    model = load_model(task["checkpoint"], torch.float32, "sdpa")
    model.rotary_emb = angle_tables(torch, model, max(map(len, task["sequences"])))

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any) -> Any:
            masks = attention_masks(torch, model.config, mask)
            rows = self.model(input_ids=ids, attention_mask=masks).last_hidden_state
            real = mask[..., None].float()
            return (rows * real).sum(1) / real.sum(1)

    return traced(torch, Encoder())


def export_funnel_transformer(torch: Any, task: dict[str, Any]) -> Any:
    """The same of a Funnel-Transformer, whose vectors are the rows of [CLS].

    With a decoder the graph is not for any length.
    """
    model = load_model(task["checkpoint"], torch.float32, "eager")
    make_traceable(model)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]

    return traced(torch, Encoder())


def traced(torch: Any, encoder: Any) -> Any:
    """The program of a module, for any number of sequences and tokens."""
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    example = tuple(map(torch.from_numpy, padded([list(range(1, 13)), list(range(7))])))
    with torch.no_grad():
        return torch.export.export(encoder, example, dynamic_shapes={"ids": sizes, "mask": sizes})


def angle_tables(torch: Any, model: Any, longest: int) -> Any:
    """A module in place of `model.rotary_emb`: positions [1, T], below `longest` -> cosines and sines, [1, T, d]."""
    by_kind = model.config.model_type in TWO_ROPES
    kinds: list[Any] = sorted(set(model.config.layer_types)) if by_kind else [None]

    class AngleTables(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for kind in kinds:
                made = model.rotary_emb(torch.zeros(1), torch.arange(longest)[None], *([kind] if kind else []))
                for name, table in zip(NAMES, made, strict=True):
                    self.register_buffer(f"{name}_{kind}", table[0])

        def forward(self, x: Any, position_ids: Any, layer_type: str | None = None) -> tuple[Any, ...]:
            return tuple(getattr(self, f"{name}_{layer_type}")[position_ids] for name in NAMES)

    return AngleTables()


def attention_masks(torch: Any, config: Any, mask: Any) -> Any:
    """What each token sees, [B, 1, T, T] bool: real tokens, and itself; a mask of each kind if layers differ.

    Args:
        config: of transformers.
        mask: [B, T], not 0 for real tokens.
    """
    places = torch.arange(mask.shape[1])
    distance = places[:, None] - places[None, :]
    real, itself = mask[:, None, None, :] != 0, distance == 0
    if is_causal(config):
        real = real & (distance >= 0)
    window = too_far(config)
    near = real if window is None else real & (distance.abs() < window)
    if config.model_type == "mistral":  # all of its layers have the window
        return near | itself
    if getattr(config, "layer_types", None) is None:
        return real | itself
    return {"full_attention": real | itself, "sliding_attention": near | itself}
