"""The architecture of a model (`ModelConfig`), its funnel (`FunnelConfig`), and what both mean for each layer.

Differences between model families are data here, so `model.forward` has one code path for all of them.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from funnel_engine.checks import check_flag, check_integer, check_number, check_option, check_positive
from funnel_kernels.errors import ConfigError
from funnel_kernels.linear import ACTIVATIONS
from funnel_kernels.pool_norm import POOLS
from funnel_kernels.recover_norm import SITES

ATTENTIONS = ("bidirectional", "causal")
LAYER_TYPES = ("full", "sliding")
FLAGS = (
    "post_norms",
    "qk_norm",
    "value_norm",
    "scale_embedding",
    "keys_as_values",
    "double_wide_mlp",
    "layer_scalar",
    "attention_bias",
    "mlp_bias",
)
POSITIONS = ("first", "last", "mid", "compact")


class Recovery(NamedTuple):
    """How the rows after the last layer are expanded to full length."""

    mode: str  # how the tiled rows are combined with full-length activations, see `recover_norm`
    source: str | None  # which activations: "first", "last", "max" or "mean" of the outputs of the full-length layers


# The last six are the paper's operations 1 to 6 (arXiv:2504.02877), in order.
RECOVERIES = {
    "tile": Recovery("tile", None),
    "sum_first": Recovery("sum", "first"),
    "sum_last": Recovery("sum", "last"),
    "sum_max": Recovery("sum", "max"),
    "sum_mean": Recovery("sum", "mean"),
    "mean_last": Recovery("mean", "last"),
    "max_last": Recovery("max", "last"),
}

Window = tuple[int, int]  # inclusive radii (left, right) in tokens


class Llama3Scaling(NamedTuple):
    """How Llama 3 stretches RoPE to longer contexts (transformers, `modeling_rope_utils.py`).

    A pair whose wavelength is at most `original_positions / high_frequency_factor` tokens keeps its frequency. If it is
    at least `original_positions / low_frequency_factor`, the frequency is divided by `factor`. Between the two it is
    interpolated.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


class Rope(NamedTuple):
    """Rotary position embedding (arXiv:2104.09864): pair `j` of a head turns by `theta ** (-2 j / head_dim)` per token.

    Attributes:
        factor: frequencies are divided by it.
        rotated: the part of the pairs that turn, from the first one on; the other pairs stay as they are (Gemma 4).
        llama3: changes the frequencies, see there.
    """

    theta: float
    factor: float = 1.0
    rotated: float = 1.0
    llama3: Llama3Scaling | None = None


class Heads(NamedTuple):
    """The attention heads of a layer."""

    queries: int  # number of query heads
    keys: int  # number of key/value heads
    dim: int

    @property
    def query_width(self) -> int:
        return self.queries * self.dim

    @property
    def key_width(self) -> int:
        return self.keys * self.dim


class Architecture(Protocol):
    """What packing, costs and the engine ask of the architecture of an encoder, see `ModelConfig`."""

    @property
    def family(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def layer_types(self) -> tuple[str, ...]: ...

    @property
    def attention(self) -> str: ...

    @property
    def truncate(self) -> bool:
        """Whether pooling leaves out the last row of a sequence (Funnel-Transformer)."""

    @property
    def token_types(self) -> bool:
        """Whether tokens have types, e.g. those of the first and of the second text of a pair."""

    def window(self, layer_type: str) -> tuple[int | None, int | None]: ...

    def heads(self, layer_type: str) -> Heads: ...

    def shares_keys(self, index: int) -> bool: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one encoder.

    Attributes:
        family: the `model_type` in its Hugging Face config, e.g. "gemma2".
        num_kv_heads: number of key/value heads; must divide `num_heads`.
        full_kv_heads, full_head_dim: those of the full layers, if they differ from the sliding ones.
        activation: of the MLP's gate, "gelu_tanh" or "silu".
        scale_embedding: whether rows of the embedding are multiplied by the square root of `hidden_size`.
        query_scale: factor of the attention scores (`query_pre_attn_scalar ** -0.5`).
        softcap: bound on the attention scores, or None.
        post_norms: whether attention and MLP outputs are normalised before they join the residual stream.
        qk_norm: whether queries and keys are normalised per head before RoPE.
        value_norm: whether values are normalised per head, without a weight.
        keys_as_values: whether the full layers have no projection of values: the projected keys are the values too.
        kv_shared_layers: the last layers, this many, have no keys and values of their own: they read those of the last
            layer of their type before them.
        double_wide_mlp: whether the MLP of those layers is twice as wide.
        per_layer_width: width of the per-layer inputs, which the end of each layer reads; 0 is none. See `model.py`.
        per_layer_vocab: rows of the table of per-layer inputs; 0 is no table, they are projections of the embedding.
        layer_scalar: whether each layer's output is multiplied by a number.
        attention_bias: whether the four projections of attention add a bias.
        mlp_bias: whether the three of the MLP do.
        layer_types: "full" or "sliding" for each layer.
        causal_window, bidirectional_window: inclusive (left, right) radii in tokens of a sliding layer, for each kind
            of attention; None if the model has no sliding layers.
        attention: "bidirectional" or "causal".
        full_rope, sliding_rope: RoPE of the full layers and of the sliding layers.
        max_positions: the longest sequence that the model supports, in tokens.
        pad_token_id: the id that classification heads skip at the end of a sequence; None skips nothing.

    Raises:
        ConfigError: the sizes do not fit together.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    query_scale: float
    attention: str
    max_positions: int
    full_rope: Rope
    sliding_rope: Rope
    causal_window: Window | None = None
    bidirectional_window: Window | None = None
    full_kv_heads: int | None = None
    full_head_dim: int | None = None
    activation: str = "gelu_tanh"
    scale_embedding: bool = True
    softcap: float | None = None
    post_norms: bool = False
    qk_norm: bool = False
    value_norm: bool = False
    keys_as_values: bool = False
    kv_shared_layers: int = 0
    double_wide_mlp: bool = False
    per_layer_width: int = 0
    per_layer_vocab: int = 0
    layer_scalar: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_eps: float = 1e-6
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            set_field(self, name, check_positive(name, getattr(self, name)))
        set_field(self, "max_positions", check_positive("max_positions", self.max_positions))
        for name in FLAGS:
            set_field(self, name, check_flag(name, getattr(self, name)))
        for name in ("kv_shared_layers", "per_layer_width", "per_layer_vocab"):
            set_field(self, name, check_integer(name, getattr(self, name), least=0))
        check_option("activation", self.activation, ACTIVATIONS)
        for name in ("full_kv_heads", "full_head_dim"):
            if getattr(self, name) is not None:
                set_field(self, name, check_positive(name, getattr(self, name)))
        for name in ("num_kv_heads", "full_kv_heads"):
            kv_heads = getattr(self, name)
            if kv_heads is not None and self.num_heads % kv_heads:
                raise ConfigError(f"num_heads={self.num_heads} must be a multiple of {name}={kv_heads}")
        for name in ("head_dim", "full_head_dim"):
            dim = getattr(self, name)
            if dim is not None and dim % 2:
                raise ConfigError(f"{name}={dim} must be even, because RoPE rotates the two halves of a head")
        if not self.layer_types:
            raise ConfigError("layer_types is empty; a model needs at least one layer")
        for layer_type in self.layer_types:
            check_option("layer type", layer_type, LAYER_TYPES)
        check_option("attention", self.attention, ATTENTIONS)
        if "sliding" in self.layer_types and (self.causal_window is None or self.bidirectional_window is None):
            raise ConfigError("the model has sliding layers but no window; set sliding_window in its config")
        own = self.layer_types[: self.num_layers - self.kv_shared_layers]
        if missing := [each for each in self.layer_types if each not in own]:
            raise ConfigError(
                f"kv_shared_layers={self.kv_shared_layers} leaves no {missing[0]} layer with keys and values of its "
                f"own, which the last layers would read; the {self.num_layers} layers need one of each type before them"
            )
        if self.per_layer_vocab and (self.per_layer_vocab < self.vocab_size or not self.per_layer_width):
            raise ConfigError(
                f"per_layer_vocab={self.per_layer_vocab} needs a row for each of the {self.vocab_size} tokens, and a "
                f"per_layer_width above 0, which is {self.per_layer_width}"
            )
        for name in ("norm_eps", "query_scale", *(["softcap"] if self.softcap is not None else [])):
            set_field(self, name, check_number(name, getattr(self, name)))
        for name in ("full_rope", "sliding_rope"):
            rope = getattr(self, name)
            if not isinstance(rope, Rope):
                raise ConfigError(f"{name}={rope!r} must be a Rope")
            set_field(self, name, check_rope(name, rope))

    truncate: ClassVar[bool] = False
    token_types: ClassVar[bool] = False

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def window(self, layer_type: str) -> tuple[int | None, int | None]:
        """The inclusive (left, right) radii in tokens of a layer; None is no limit."""
        if layer_type == "full":
            return (None, 0 if self.attention == "causal" else None)
        window = self.causal_window if self.attention == "causal" else self.bidirectional_window
        assert window is not None  # checked in __post_init__
        return window

    def rope(self, layer_type: str) -> Rope:
        return self.full_rope if layer_type == "full" else self.sliding_rope

    def heads(self, layer_type: str) -> Heads:
        kv_heads, dim = self.num_kv_heads, self.head_dim
        if layer_type == "full":
            kv_heads, dim = self.full_kv_heads or kv_heads, self.full_head_dim or dim
        return Heads(self.num_heads, kv_heads, dim)

    def shares_keys(self, index: int) -> bool:
        """Whether a layer reads the keys and values of an earlier layer, see `kv_shared_layers`."""
        return index >= self.num_layers - self.kv_shared_layers

    def mlp_width(self, index: int) -> int:
        """The width of a layer's MLP."""
        return self.intermediate_size * (2 if self.double_wide_mlp and self.shares_keys(index) else 1)


def check_rope(name: str, rope: Rope) -> Rope:
    """Raises `ConfigError` unless the numbers of a RoPE are positive, and those of Llama 3 are in order."""
    theta, factor = check_number(f"{name}.theta", rope.theta), check_number(f"{name}.factor", rope.factor)
    rotated = check_number(f"{name}.rotated", rope.rotated)
    if rotated > 1:
        raise ConfigError(f"{name}.rotated={rotated} must be at most 1, which rotates every pair of a head")
    if rope.llama3 is None:
        return Rope(theta, factor, rotated)
    stretch, low, high, positions = rope.llama3
    scaling = Llama3Scaling(
        check_number(f"{name}.llama3.factor", stretch),
        check_number(f"{name}.llama3.low_frequency_factor", low),
        check_number(f"{name}.llama3.high_frequency_factor", high),
        check_positive(f"{name}.llama3.original_positions", positions),
    )
    if scaling.low_frequency_factor >= scaling.high_frequency_factor:
        raise ConfigError(
            f"{name}.llama3: low_frequency_factor={scaling.low_frequency_factor:g} must be below "
            f"high_frequency_factor={scaling.high_frequency_factor:g}"
        )
    return Rope(theta, factor, rotated, scaling)


@dataclasses.dataclass(frozen=True)
class FunnelConfig:
    """Where and how the token axis is pooled. Semantics: docs/semantics.md.

    Attributes:
        strides: entry `i` is the stride applied to the residual stream before layer `i`; missing entries are 1.
            `(1, 1, 2)` pools pairs of rows after two full-length layers, like the paper's "Funnel Pooling Config".
        pool: "max" (default; elementwise, signed), "mean" or "first" of the real rows of a window.
        pool_query_only: in a pooling layer, take keys and values from the unpooled rows (as Funnel-Transformer does).
        positions: RoPE position of a pooled row: the "first" token of its window, the "last", "mid" (halfway between
            them), or "compact" (rows are renumbered; not with `pool_query_only`).
        keep_first: leave the first token alone in its window at every level.
        keep_last: leave the last token alone in its window at every level, for models whose vector is the last token's
            row; not with `keep_first`.
        recovery: how every token gets a row again after the last layer: None, "tile", "sum_first", "sum_last",
            "sum_max", "sum_mean", "mean_last" or "max_last".
        recovery_site: "before_norm" or "after_norm", relative to the final norm.

    Raises:
        ConfigError: a value is unknown, a stride is below 1, or options contradict each other.
    """

    strides: tuple[int, ...] = ()
    _: dataclasses.KW_ONLY
    pool: str = "max"
    pool_query_only: bool = False
    positions: str = "first"
    keep_first: bool = False
    keep_last: bool = False
    recovery: str | None = None
    recovery_site: str = "before_norm"

    def __post_init__(self) -> None:
        if not isinstance(self.strides, (tuple, list)):
            raise ConfigError(f"strides={self.strides!r} must be a tuple of integers, one for each layer")
        strides = tuple(check_positive(f"strides[{index}]", stride) for index, stride in enumerate(self.strides))
        set_field(self, "strides", strides)
        check_option("pool", self.pool, POOLS)
        for name in ("pool_query_only", "keep_first", "keep_last"):
            set_field(self, name, check_flag(name, getattr(self, name)))
        check_option("positions", self.positions, POSITIONS)
        check_option("recovery_site", self.recovery_site, SITES)
        if self.recovery is not None:
            check_option("recovery", self.recovery, tuple(RECOVERIES))
            if self.total_stride == 1:
                raise ConfigError(
                    f"recovery={self.recovery!r} needs a funnel, but all strides are 1; "
                    "give a stride above 1 or leave recovery out"
                )
        if self.keep_first and self.keep_last:
            raise ConfigError(
                "keep_first and keep_last cannot be used together, because windows are counted from one end of a "
                "sequence; use keep_last if the model reads the last token, else keep_first"
            )
        if self.positions == "compact" and self.pool_query_only:
            raise ConfigError(
                "positions='compact' cannot be used with pool_query_only, whose unpooled keys are not renumbered; "
                "use positions 'first', 'last' or 'mid'"
            )

    @classmethod
    def after(cls, layers: int, *, stride: int = 2, **options: Any) -> "FunnelConfig":
        """One funnel after `layers` full-length layers: `after(6)` has strides `(1, 1, 1, 1, 1, 1, 2)`."""
        return cls(strides=(1,) * check_integer("layers", layers, least=0) + (stride,), **options)

    @classmethod
    def parse(cls, text: str) -> "FunnelConfig":
        """The funnel of a short form, e.g. "6:2" or "2:2,8:2/mean/keep_first/mean_last"; "none" is no funnel.

        `layer:stride` pairs come first. Options follow after slashes, in any order: a pool, a position, a recovery,
        "keep_first", "keep_last", "pool_query_only" and "after_norm". "first" is the pool: the position "first" is the
        default.

        Raises:
            ConfigError: the text is not a short form, or the funnel is not possible.
        """
        if text == "none":
            return cls()
        pairs, *words = text.split("/")
        strides: list[int] = []
        for pair in pairs.split(","):
            if (numbers := SHORT_PAIR.fullmatch(pair)) is None:
                raise ConfigError(
                    f"funnel {text!r}: {pair!r} must be LAYER:STRIDE, e.g. 6:2 for pairs of rows after layer 6; "
                    "options follow after a slash, e.g. 6:2/mean"
                )
            layer, stride = map(int, numbers.groups())
            if layer < len(strides):
                raise ConfigError(f"funnel {text!r}: layers must ascend, but {layer} comes after {len(strides) - 1}")
            strides += [1] * (layer - len(strides)) + [stride]
        options: dict[str, Any] = {}
        for word in words:
            name, value = SHORT_OPTIONS.get(word, (word, None))
            if value is None:
                raise ConfigError(f"funnel {text!r}: {word!r} is unknown; options are {', '.join(SHORT_OPTIONS)}")
            if name in options:
                raise ConfigError(f"funnel {text!r}: {word!r} gives {name} a second time; give it once")
            options[name] = value
        return cls(tuple(strides), **options)

    def __str__(self) -> str:
        """The short form, which `parse` reads: places, and every option that is not the default."""
        places = ",".join(f"{layer}:{stride}" for layer, stride in enumerate(self.strides) if stride > 1)
        default = FunnelConfig()
        words = [
            word
            for word, (name, value) in SHORT_OPTIONS.items()
            if getattr(self, name) == value != getattr(default, name)
        ]
        return "/".join([places, *words]) if places else "none"

    @property
    def classes(self) -> tuple["LengthClass", ...]:
        """One class, as if it were a `FunnelByLength`: this funnel for sequences of every length."""
        return (LengthClass(0, self),)

    @property
    def total_stride(self) -> int:
        """Tokens per row after the last layer, which is the product of the strides."""
        total = 1
        for stride in self.strides:
            total *= stride
        return total

    @property
    def output_stride(self) -> int:
        """Tokens per row of the model's output."""
        return self.total_stride if self.recovery is None else 1


# The words of a funnel's short form, and the field and value that each one is for.
SHORT_OPTIONS: dict[str, tuple[str, Any]] = {
    **{pool: ("pool", pool) for pool in POOLS},
    **{position: ("positions", position) for position in POSITIONS if position != "first"},
    "keep_first": ("keep_first", True),
    "keep_last": ("keep_last", True),
    "pool_query_only": ("pool_query_only", True),
    **{recovery: ("recovery", recovery) for recovery in RECOVERIES},
    "after_norm": ("recovery_site", "after_norm"),
}
SHORT_PAIR = re.compile(r"([0-9]{1,4}):([0-9]{1,9})")  # no model has 10,000 layers


class LengthClass(NamedTuple):
    """The funnel of sequences of at least `tokens` tokens, up to those of the next class."""

    tokens: int
    funnel: FunnelConfig


@dataclasses.dataclass(frozen=True)
class FunnelByLength:
    """A funnel for each class of sequence lengths: short sequences gain little from a funnel and lose most.

        FunnelByLength([(0, None), (64, "6:2/mean"), (512, "2:2/mean")])

    Attributes:
        classes: pairs of a number of tokens, ascending from 0, and the funnel of sequences from this length on. It may
            be given as a `FunnelConfig`, as its short form, or as None for no funnel.

    Raises:
        ConfigError: the first class does not begin at 0, numbers do not ascend, or a funnel is not possible.
    """

    classes: tuple[LengthClass, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.classes, (tuple, list)) or not self.classes:
            raise ConfigError(f"classes={self.classes!r:.80} must be pairs (tokens, funnel), e.g. (64, '6:2/mean')")
        classes = tuple(read_class(index, pair) for index, pair in enumerate(self.classes))
        starts = [each.tokens for each in classes]
        if starts[0] != 0:
            raise ConfigError(f"the first funnel is for {starts[0]} tokens or more; add one for 0, e.g. (0, None)")
        for before, tokens in itertools.pairwise(starts):
            if tokens <= before:
                raise ConfigError(f"numbers of tokens must ascend, but {tokens} comes after {before}")
        set_field(self, "classes", classes)

    @classmethod
    def parse(cls, text: str) -> "FunnelByLength":
        """The funnels of a short form, e.g. "0=none+64=6:2/mean+512=2:2/mean".

        Raises:
            ConfigError: the text is not a short form, or the funnels are not possible.
        """
        classes = []
        for part in text.split("+"):
            if (found := SHORT_CLASS.fullmatch(part)) is None:
                raise ConfigError(
                    f"funnel {text!r}: {part!r} must be TOKENS=FUNNEL, e.g. 64=6:2/mean for sequences of 64 tokens or "
                    "more; a plus follows before the next one"
                )
            classes.append(LengthClass(int(found[1]), FunnelConfig.parse(found[2])))
        return cls(tuple(classes))

    def __str__(self) -> str:
        """The short form, which `parse` reads."""
        return "+".join(f"{tokens}={funnel}" for tokens, funnel in self.classes)

    @property
    def total_stride(self) -> int:
        """The largest of any class."""
        return max(funnel.total_stride for _, funnel in self.classes)


Funnel = FunnelConfig | FunnelByLength
FunnelLike = Funnel | Sequence[tuple[int, FunnelConfig | str | None]]  # what `read_funnel` takes
SHORT_CLASS = re.compile(r"([0-9]{1,9})=(.+)")


def read_class(index: int, pair: Any) -> LengthClass:
    """One pair of `FunnelByLength`."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ConfigError(f"funnel[{index}]={pair!r:.80} must be a pair (tokens, funnel), e.g. (64, '6:2/mean')")
    tokens, funnel = pair
    if funnel is None:
        funnel = FunnelConfig()
    elif isinstance(funnel, str):
        funnel = FunnelConfig.parse(funnel)
    elif not isinstance(funnel, FunnelConfig):
        raise ConfigError(
            f"funnel[{index}]: {funnel!r:.80} must be a FunnelConfig, its short form, e.g. '6:2/mean', or None for no "
            "funnel"
        )
    return LengthClass(check_integer(f"funnel[{index}]: tokens", tokens, least=0), funnel)


def read_funnel(value: FunnelLike) -> Funnel:
    """A funnel as a user gives it. One for all lengths is a `FunnelConfig`, also if it is given as a list of one pair.

    Raises:
        ConfigError: it is not a funnel.
    """
    if isinstance(value, FunnelConfig):
        return value
    if isinstance(value, (tuple, list)):
        value = FunnelByLength(tuple(value))
    if not isinstance(value, FunnelByLength):
        raise ConfigError(
            f"funnel={value!r:.80} must be a FunnelConfig; FunnelConfig() means no funnel, and FunnelConfig.parse "
            "reads the short form, e.g. '6:2/mean'. A list such as [(0, None), (64, '6:2/mean')] chooses by length"
        )
    return value if len(value.classes) > 1 else value.classes[0].funnel


def parse_funnel(text: str) -> Funnel:
    """The funnel of a short form, for all lengths ("6:2/mean") or by length ("0=none+64=6:2/mean").

    Raises:
        ConfigError: the text is not a short form, or the funnel is not possible.
    """
    return read_funnel(FunnelByLength.parse(text)) if "=" in text else FunnelConfig.parse(text)


class LayerStep(NamedTuple):
    """The token axis at one layer. Strides are in tokens per row."""

    layer: int  # its index
    layer_type: str  # "full" or "sliding"
    pool: int  # stride applied to the residual stream before this layer; 1 is no pooling
    query_stride: int  # of the queries, and of the residual stream from here on
    key_stride: int  # of the keys and values
    shares_keys: bool  # whether these are those of an earlier layer


def layer_steps(config: Architecture, funnel: FunnelConfig) -> list[LayerStep]:
    """The token axis at each layer.

    Raises:
        ConfigError: the funnel has more strides than the model has layers, or pools more than a whole sequence, or
            renumbers rows whose layers read keys from before the funnel.
    """
    if len(funnel.strides) > config.num_layers:
        raise ConfigError(
            f"the funnel has {len(funnel.strides)} strides but the model has only {config.num_layers} layers; "
            f"give at most one per layer, so a funnel can be after layer {config.num_layers - 1} at the latest"
        )
    if funnel.total_stride > config.max_positions:
        raise ConfigError(
            f"strides {funnel.strides} pool {funnel.total_stride} tokens into one row, but the longest sequence of the "
            f"model has {config.max_positions}; use smaller strides"
        )
    strides = funnel.strides + (1,) * (config.num_layers - len(funnel.strides))
    steps, stride = [], 1
    key_strides: dict[str, int] = {}  # of the last layer of each type
    for index, (layer_type, pool) in enumerate(zip(config.layer_types, strides, strict=True)):
        shares_keys = config.shares_keys(index)
        if not shares_keys:
            key_strides[layer_type] = stride if funnel.pool_query_only else stride * pool
        stride *= pool
        steps.append(LayerStep(index, layer_type, pool, stride, key_strides[layer_type], shares_keys))
        if funnel.positions == "compact" and key_strides[layer_type] != stride:
            raise ConfigError(
                f"positions='compact' cannot be used with a funnel before layer {index} of this model, which reads the "
                "keys of a layer before the funnel, and these are not renumbered; use positions 'first', 'last' or "
                "'mid'"
            )
    return steps


def check_funnel(config: Architecture, funnel: Funnel) -> None:
    """Raises `ConfigError` unless a funnel fits a model: each class as in `layer_steps`, and none is out of reach."""
    for tokens, each in funnel.classes:
        layer_steps(config, each)
        if tokens > config.max_positions:
            raise ConfigError(
                f"the funnel {each} is for {tokens} tokens or more, but the longest sequence of the model has "
                f"{config.max_positions}; leave it out"
            )


def set_field(instance: Any, name: str, value: Any) -> None:
    """Sets a field of a frozen dataclass; only its own `__post_init__` may do this."""
    object.__setattr__(instance, name, value)
