"""The architecture of a Funnel-Transformer (Dai et al. 2020, arXiv:2006.03236), and the funnel that its blocks are."""

import dataclasses
import itertools
from typing import ClassVar

from funnel_engine.checks import check_flag, check_integer, check_number, check_positive
from funnel_engine.config import FunnelConfig, Heads, ModelConfig, set_field
from funnel_kernels.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunnelTransformerConfig:
    """The architecture of one Funnel-Transformer. Between its blocks it is a `FunnelConfig`, see `funnel`.

    Attributes:
        family: the `model_type` in its Hugging Face config, "funnel".
        block_sizes: number of layers with weights of their own in each block.
        block_repeats: how often each layer of a block is applied, one time after another.
        decoder_layers: full-length layers after the recovery; 0 if the checkpoint has no decoder.
        separate_cls: whether the first token, [CLS], has neither a relative position nor a token type.
        truncate: whether pooling leaves out the last row of a sequence that has three rows or more. Only where the
            funnel keeps the first token alone.
        max_positions: the longest sequence that the model supports, in tokens.

    Raises:
        ConfigError: the sizes do not fit together.
    """

    family: str = "funnel"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    block_sizes: tuple[int, ...]
    block_repeats: tuple[int, ...]
    decoder_layers: int
    separate_cls: bool = True
    truncate: bool = True
    max_positions: int = 512
    norm_eps: float = 1e-9
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "head_dim", "max_positions"):
            set_field(self, name, check_positive(name, getattr(self, name)))
        for name in ("separate_cls", "truncate"):
            set_field(self, name, check_flag(name, getattr(self, name)))
        set_field(self, "decoder_layers", check_integer("decoder_layers", self.decoder_layers, least=0))
        set_field(self, "norm_eps", check_number("norm_eps", self.norm_eps))
        for name in ("block_sizes", "block_repeats"):
            numbers = tuple(check_positive(f"{name}[{index}]", n) for index, n in enumerate(getattr(self, name)))
            set_field(self, name, numbers)
        if not self.block_sizes or len(self.block_sizes) != len(self.block_repeats):
            raise ConfigError(
                f"block_sizes={self.block_sizes} and block_repeats={self.block_repeats} must have one number for each "
                "block, and at least one"
            )
        if self.decoder_layers and len(self.block_sizes) == 1:
            raise ConfigError(
                "a model of one block does not pool, so it has no decoder; leave the decoder out, or give more blocks"
            )
        if self.hidden_size % 2:
            raise ConfigError(f"hidden_size={self.hidden_size} must be even: half of a position is sines, half cosines")

    @property
    def applied(self) -> tuple[int, ...]:
        """For each layer in the order in which they are applied, the number of the layer whose weights it has."""
        layers: list[int] = []
        for size, repeats in zip(self.block_sizes, self.block_repeats, strict=True):
            first = layers[-1] + 1 if layers else 0
            layers += [layer for layer in range(first, first + size) for _ in range(repeats)]
        return tuple(layers)

    def funnel(self, *, pool: str, pool_query_only: bool) -> FunnelConfig:
        """Pairs of rows are pooled at the beginning of every block but the first.

        With a decoder, the rows are tiled and added to those after the first block.
        """
        lengths = [size * repeats for size, repeats in zip(self.block_sizes, self.block_repeats, strict=True)]
        starts = [0, *itertools.accumulate(lengths)][1:-1]
        strides = tuple(2 if layer in starts else 1 for layer in range(starts[-1] + 1)) if starts else ()
        return FunnelConfig(
            strides,
            pool=pool,
            pool_query_only=pool_query_only,
            keep_first=self.separate_cls,
            recovery="sum_last" if self.decoder_layers else None,
        )

    token_types: ClassVar[bool] = True
    per_layer_width: ClassVar[int] = 0
    per_layer_vocab: ClassVar[int] = 0

    # What packing, costs and the engine ask of every architecture.

    @property
    def num_layers(self) -> int:
        """Layers that are applied before the recovery."""
        return len(self.applied)

    @property
    def layer_types(self) -> tuple[str, ...]:
        return ("full",) * self.num_layers

    @property
    def attention(self) -> str:
        return "bidirectional"

    def window(self, layer_type: str) -> tuple[int | None, int | None]:
        return None, None

    def heads(self, layer_type: str) -> Heads:
        return Heads(self.num_heads, self.num_heads, self.head_dim)

    def shares_keys(self, index: int) -> bool:
        return False

    def mlp_width(self, index: int) -> int:
        return self.intermediate_size


EncoderConfig = ModelConfig | FunnelTransformerConfig


def require_model_config(config: EncoderConfig, what: str) -> ModelConfig:
    """The config, for what Funnel-Transformer does not have or is not made for.

    Raises:
        ConfigError: it is one.
    """
    if isinstance(config, FunnelTransformerConfig):
        raise ConfigError(f"{what} is not for a Funnel-Transformer; leave it out, or take another checkpoint")
    return config
