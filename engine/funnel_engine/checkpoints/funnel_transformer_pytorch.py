"""Reads a Funnel-Transformer as its authors published it for PyTorch: net_config.pytorch.json and model.pt.

See https://github.com/laiguokun/Funnel-Transformer. The files contain the encoder without decoder and heads. Layers are
numbered over all blocks, and matrices are stored as [in, out], with heads and their width as two axes.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from funnel_engine.checkpoints.funnel_transformer import find_texts, norm_parts, pooling_of
from funnel_engine.checkpoints.gemma_pytorch import read_file
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checkpoints.tensors import Part, Parts, assemble, drop_by_name, unwrap
from funnel_engine.funnel_transformer_config import FunnelTransformerConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.hugging_face_config.funnel_transformer import read_funnel_transformer_config
from funnel_engine.input_files import decode, file_in, is_file, read_json, reading
from funnel_engine.models.funnel_transformer import weight_shapes
from funnel_kernels.errors import CheckpointError, ConfigError

CONFIG, WEIGHTS = "net_config.pytorch.json", "model.pt"
DROPPED = drop_by_name((".k_head.bias",))
BLOCK = re.compile(r"([0-9]{1,4})(?:x([0-9]{1,4}))?")  # "6", or "3x2": 3 layers, each applied twice
NORMS = {"attention_norm": "attn_layers.{}.layer_norm", "mlp_norm": "pffn_layers.{}.layer_norm"}


@dataclasses.dataclass(frozen=True)
class NetConfig:
    """The content of net_config.pytorch.json.

    Attributes:
        block_size: the number of layers in each block, and how often they are applied, e.g. "6_3x2_3x2".
    """

    vocab_size: int
    d_embed: int
    d_model: int
    n_head: int
    d_head: int
    d_inner: int
    dropout: float
    dropatt: float
    dropact: float
    block_size: str
    pooling_type: str
    pooling_size: int
    separate_cls: bool
    pool_q_only: bool

    def hugging_face(self) -> dict[str, Any]:
        """The same as the fields of a config.json.

        It does not say whether pooling leaves out the last row: it did in pre-training, and does in the config.json of
        every published model.

        Raises:
            ConfigError: the model is one that Hugging Face's files cannot describe.
        """
        blocks = [BLOCK.fullmatch(block) for block in self.block_size.split("_")]
        if not all(blocks):
            raise ConfigError(f"block_size={self.block_size!r:.80} must be a number for each block, e.g. '6_3x2_3x2'")
        if self.d_embed != self.d_model:
            raise ConfigError(f"d_embed={self.d_embed} must be d_model={self.d_model}; there is no projection between")
        if self.pooling_size != 2:
            raise ConfigError(f"pooling_size={self.pooling_size} is not supported; it must be 2")
        unchanged = ("vocab_size", "d_model", "n_head", "d_head", "d_inner", "pooling_type", "separate_cls")
        return {name: getattr(self, name) for name in unchanged} | {
            "pool_q_only": self.pool_q_only,
            "block_sizes": [int(block[1]) for block in blocks if block],
            "block_repeats": [int(block[2] or 1) for block in blocks if block],
        }


def matches(path: Path) -> bool:
    """Whether a folder has the authors' config."""
    return is_file(path / CONFIG)


def read_funnel_transformer_pytorch(root: Path, sliding_window: int | None = None) -> SourceModel:
    """Reads a directory without the values of its tensors.

    Raises:
        CheckpointError: files are missing, damaged or do not fit together.
        ConfigError: the architecture is not supported.
    """
    if sliding_window is not None:
        raise CheckpointError(f"{root} is a Funnel-Transformer, which has no sliding window; leave it out")
    config_file = file_in(root, CONFIG, str(root))
    weights_file = file_in(root, WEIGHTS, str(root))
    with reading(config_file):
        net: NetConfig = decode(NetConfig, read_json(config_file), str(config_file))
        config, funnel = read_funnel_transformer_config(net.hugging_face(), has_decoder=False)
    weights, dropped = assemble(root, parts_of(config), unwrap(weights_file, read_file(weights_file)), DROPPED)
    return SourceModel(
        format="funnel_transformer_pytorch",
        config=config,
        head=HeadConfig(pooling_of(config)),
        weights=weights,
        dropped=dropped,
        directory=root,
        funnel=funnel,
        **find_texts(root, config),
    )


def parts_of(config: FunnelTransformerConfig) -> Parts:
    """For each of our weights, the tensors that contain its values, in order."""
    width, mlp, heads = config.hidden_size, config.intermediate_size, (config.num_heads, config.head_dim)
    per_head = (width, *heads)  # of a projection to heads; a row of ours is one column of one head
    layer: dict[str, list[Part]] = {
        "qkv": [Part(f"attn_layers.{{}}.{name}_head.weight", per_head, axes=(1, 2, 0)) for name in "qkv"],
        "value_bias": [Part("attn_layers.{}.v_head.bias", heads)],
        "relative_biases": [Part(f"attn_layers.{{}}.r_{name}_bias", heads) for name in "wrs"],
        "relative_positions": [Part("attn_layers.{}.r_kernel", per_head, axes=(1, 2, 0))],
        "relative_types": [Part("attn_layers.{}.seg_embed", (2, *heads))],
        "attention_output": [Part("attn_layers.{}.post_proj.weight", (*heads, width), axes=(2, 0, 1))],
        "attention_output_bias": [Part("attn_layers.{}.post_proj.bias", (width,))],
        "up": [Part("pffn_layers.{}.pffn.0.weight", (width, mlp), axes=(1, 0))],
        "up_bias": [Part("pffn_layers.{}.pffn.0.bias", (mlp,))],
        "down": [Part("pffn_layers.{}.pffn.3.weight", (mlp, width), axes=(1, 0))],
        "down_bias": [Part("pffn_layers.{}.pffn.3.bias", (width,))],
        **{ours: list(norm_parts(name, width)) for ours, name in NORMS.items()},
    }
    parts: dict[str, tuple[Part, ...]] = {
        "embedding": (Part("input_layer.0.lookup_table", (config.vocab_size, width)),),
        "embedding_norm": norm_parts("input_layer.1", width),
    }
    for ours in weight_shapes(config):
        if ours not in parts:
            _, index, leaf = ours.split(".")
            parts[ours] = tuple(part._replace(name=part.name.format(index)) for part in layer[leaf])
    return parts
