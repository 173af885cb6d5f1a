"""Tiny random Hugging Face models of every family that the engine runs: the yardstick of the parity tests.

Every size is another number, so that no wrong transpose, split or group goes unnoticed. Matrices have the deviation
that gives the products of a real model: 0.02 at Gemma 2B's width of 2048 is `0.9 / sqrt(fan in)`. With 0.02 at this
width every softmax would be flat, and RoPE, softcap and score scale could be wrong unseen.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import oracle
from funnel_engine import Engine, FunnelConfig, convert

SIZES: dict[str, Any] = {
    "hidden_size": 48,  # a multiple of the heads, or the configuration classes refuse it
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,  # queries are 84 wide, keys and values 28
    "vocab_size": 101,
    "max_position_embeddings": 2048,
}
LABELS = 5
NO_FUNNEL = FunnelConfig()
PAD = 0
SCORES = {"query_pre_attn_scalar": 11, "attn_logit_softcapping": 1.7}  # scores are of order 1, so is the softcap


def gemma(**fields: Any) -> transformers.GemmaConfig:
    return transformers.GemmaConfig(num_labels=LABELS, **SIZES | fields)


def gemma2(**fields: Any) -> transformers.Gemma2Config:
    return transformers.Gemma2Config(num_labels=LABELS, **SIZES | SCORES | {"sliding_window": 9} | fields)


def gemma3(**fields: Any) -> transformers.Gemma3TextConfig:
    """EmbeddingGemma has `use_bidirectional_attention=True`."""
    own = {"query_pre_attn_scalar": 11, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    fields = SIZES | own | fields
    layer_types = (fields["layer_types"] * fields["num_hidden_layers"])[: fields["num_hidden_layers"]]
    return transformers.Gemma3TextConfig(num_labels=LABELS, **fields | {"layer_types": layer_types})


def t5gemma(**fields: Any) -> transformers.T5GemmaConfig:
    """`fields` are those of the encoder; the decoder is never run."""
    return transformers.T5GemmaConfig(
        encoder=SIZES | SCORES | {"sliding_window": 8} | fields,
        decoder=SIZES | {"num_hidden_layers": 1},
        vocab_size=SIZES["vocab_size"],
        num_labels=LABELS,
        is_encoder_decoder=False,
    )


def t5gemma2(**fields: Any) -> transformers.T5Gemma2Config:
    """`fields` are those of the text encoder. Its id 77 is the end of an image, with an embedding of its own."""
    fields = SIZES | {"query_pre_attn_scalar": 11, "sliding_window": 9, "num_hidden_layers": 2} | fields
    fields["layer_types"] = ["sliding_attention", "full_attention"] * (fields["num_hidden_layers"] // 2)
    vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.T5Gemma2Config(
        encoder={
            "text_config": fields,
            "vision_config": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **vision},
            "eoi_token_index": 77,
            "mm_tokens_per_image": 4,
        },
        decoder=SIZES | {"num_hidden_layers": 1},
        vocab_size=SIZES["vocab_size"],
        image_token_index=99,
    )


class T5Gemma2Encoder(transformers.T5Gemma2Model):
    """T5Gemma 2 without its decoder. Its own class for this ignores the config's end-of-image token."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask)


def llama(**fields: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(num_labels=LABELS, **SIZES | fields)


def mistral(**fields: Any) -> transformers.MistralConfig:
    return transformers.MistralConfig(num_labels=LABELS, **SIZES | {"sliding_window": 9} | fields)


def qwen3(**fields: Any) -> transformers.Qwen3Config:
    """The window, if there is one, begins at layer 1."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return transformers.Qwen3Config(num_labels=LABELS, **SIZES | window | fields)


def eurobert(**fields: Any) -> transformers.EuroBertConfig:
    return transformers.EuroBertConfig(num_labels=LABELS, **SIZES | {"pad_token_id": PAD} | fields)


# In 26 tokens, the pairs of a head of 14 make 4.1 turns (a short wave), 1.1 and 0.3 (between), 0.08 and fewer (long).
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 0.2,
    "high_freq_factor": 1.2,
    "original_max_position_embeddings": 26,
}
# Their norms multiply by the weight itself, and are random around 1. Those of Gemma 4 are random around 0: with such
# factors the scores, which have no scale there, would be large, and every softmax would see one key.
FACTOR_NORMS = ("llama", "mistral", "qwen3", "eurobert")


def embedding_gemma2(**fields: Any) -> transformers.EmbeddingGemma2TextConfig:
    return transformers.EmbeddingGemma2TextConfig(**gemma4_fields(PROJECTED | {"sliding_window": 4} | fields))


def gemma4(**fields: Any) -> transformers.Gemma4TextConfig:
    return transformers.Gemma4TextConfig(**gemma4_fields(fields))


PROJECTED = {"embedding_dim": 58, "num_global_key_value_heads": 1}


def gemma4_fields(fields: dict[str, Any]) -> dict[str, Any]:
    own = {
        "sliding_window": 8,
        "global_head_dim": 20,
        "hidden_size_per_layer_input": 22,
        "vocab_size_per_layer_input": 103,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    fields = SIZES | {"num_hidden_layers": 4} | own | fields
    return fields | {"layer_types": fields["layer_types"] * (fields["num_hidden_layers"] // 2)}


def build(
    model_class: type[transformers.PreTrainedModel],
    config: transformers.PreTrainedConfig,
    *,
    deviation: float | None = None,
    seed: int = 0,
) -> Any:
    """A float32 model in evaluation mode. Every tensor is random, norms and biases too; matrices have the standard
    deviation `deviation`, or that of real products (see above)."""
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = deviation or 0.9 / parameter.shape[-1] ** 0.5
            mean = 1.0 if name.endswith("norm.weight") and config.model_type in FACTOR_NORMS else 0.0
            parameter.normal_(mean, matrix if parameter.ndim == 2 else 0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.normal_(1.0, 0.3, generator=generator)
    return model


def repair_bidirectional_attention(model: Any) -> None:
    """Makes transformers 5.23 attend as the models' authors do, in a model that is already saved.

    Gemma 3 is right as it is.
    """
    config = model.config
    if config.model_type in ("gemma", "gemma2", "llama", "mistral", "qwen3"):
        config.is_causal = False  # decides the mask; use_bidirectional_attention alone leaves eager attention causal
    if config.model_type == "gemma2":
        config.sliding_window -= 1  # the mask is |q - k| <= window, its authors' is |q - k| < window
    if config.model_type == "t5gemma":
        config.encoder.sliding_window -= 1  # as Gemma 2
    if config.model_type == "gemma4_text":
        config.sliding_window -= 1  # it has been halved and is 1 more than on each side, but the mask is |q - k| <= it


@dataclasses.dataclass(frozen=True)
class Specimen:
    """One random model, as transformers, the oracle and the engine see it."""

    model: Any
    attention: str
    config: dict[str, Any]  # its config.json
    tensors: dict[str, np.ndarray]  # float64
    source: Path  # Hugging Face checkpoint
    checkpoint: Path  # ours, float32

    @classmethod
    def make(cls, directory: Path, model: Any, attention: str) -> "Specimen":
        source, checkpoint = directory / "source", directory / "checkpoint"
        model.save_pretrained(source)
        convert(source, checkpoint, dtype="float32")
        if attention == "bidirectional":
            repair_bidirectional_attention(model)
        if model.config.model_type == "embedding_gemma2_text":
            model.embedding_projection = torch.nn.Identity()  # the engine projects the pooled row
        config = json.loads((source / "config.json").read_text())
        return cls(model, attention, config, float64_tensors(model), source, checkpoint)

    def engine(self, **options: Any) -> Engine:
        return Engine.load(self.checkpoint, attention=self.attention, **options)

    def truth(self, ids: list[int], funnel: FunnelConfig = NO_FUNNEL) -> np.ndarray:
        """[R, D] float64 rows after the final norm."""
        return oracle.forward(self.tensors, self.config, ids, self.attention, **dataclasses.asdict(funnel))

    @torch.no_grad()
    def transformers_rows(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """[T, D] float32 rows after the final norm for each sequence of a batch padded on the right."""
        ids, mask = pad(sequences)
        rows = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
        return [row[: len(sequence)] for row, sequence in zip(rows, sequences, strict=True)]

    @torch.no_grad()
    def transformers_logits(self, sequences: list[list[int]]) -> np.ndarray:
        """Logits of a task model: [B, labels], or [B, longest, labels] of a token classifier."""
        ids, mask = pad(sequences)
        return self.model(input_ids=ids, attention_mask=mask).logits.numpy()


def float64_tensors(model: Any) -> dict[str, np.ndarray]:
    """Weights for the oracle; names without the prefixes of task models and of the T5Gemmas."""
    prefix = re.compile(r"^(model\.)?(encoder\.)?(text_model\.)?")
    return {prefix.sub("", name): tensor.numpy().astype(np.float64) for name, tensor in model.state_dict().items()}


def pad(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, longest], padded on the right, and their attention mask: pad ids that are in the text stay visible."""
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [PAD] * (longest - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    return ids, mask


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Sequences of these lengths; the pad id occurs in them like any other."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, SIZES["vocab_size"], length).tolist() for length in lengths]


def worst(rows: Any, truth: Any) -> float:
    """The largest absolute difference between two lists of arrays of equal shapes."""
    assert [np.shape(row) for row in rows] == [np.shape(row) for row in truth]
    return max(float(np.abs(a - b).max()) for a, b in zip(rows, truth, strict=True))


def assert_as_right_as_transformers(ours: Any, theirs: Any, truth: Any) -> None:
    """The engine may be twice as far from the float64 truth as float32 transformers is, plus 1e-6."""
    our_error, their_error = worst(ours, truth), worst(theirs, truth)
    assert their_error < 2e-5, "transformers computes another function than the oracle, and proves nothing"
    assert our_error <= 2 * their_error + 1e-6
