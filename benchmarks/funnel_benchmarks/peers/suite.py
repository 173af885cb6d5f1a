"""The peers suite: `Engine.embed` against other engines with the same weights and token ids.

Each peer sleeps in a process of its own until it is asked for a call, so ours and its calls alternate, A B B A. Before
anything is timed both results are compared with those of Hugging Face in float32: nothing is timed that computes
something else. Both begin with token ids on the host (sentence-transformers with texts, and then so does ours) and end
with vectors on the host. `forms.py` says which dtype a peer computes in beside ours.

There are two scenarios: "batch" embeds all sequences in one call of ours, and in the peer's batches; "one" embeds one
sequence after another, whose latencies are the samples.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from funnel_benchmarks.charts import Chart, Panel, Series
from funnel_benchmarks.inputs import SEED
from funnel_benchmarks.lengths import length_facts
from funnel_benchmarks.machine import multiplies_bfloat16, multiplies_int8, usable_cores
from funnel_benchmarks.measure import Call, Sample, compiling_nothing, sampler, spread
from funnel_benchmarks.models import check_depth
from funnel_benchmarks.peers import gguf_file, hugging_face, llama_cpp_peer
from funnel_benchmarks.peers.batches import in_order, make_batches
from funnel_benchmarks.peers.forms import COMMON, ENGINE, PEERS, SENTENCE, dtype_beside
from funnel_benchmarks.peers.peer import Peer
from funnel_benchmarks.peers.peer_process import not_installed
from funnel_benchmarks.peers.sentence_model import text_of, write_sentence_model
from funnel_benchmarks.random_checkpoint import (
    ARCHITECTURES,
    DTYPE,
    FUNNEL_TRANSFORMER,
    read_encoder_config,
    write_random_model,
)
from funnel_benchmarks.results import LeftOut, Measurement, Results, Row
from funnel_benchmarks.statistics import interleave, quartiles
from funnel_benchmarks.suite import Cell, Column, Section, Table, field, number
from funnel_benchmarks.suite import Suite as BaseSuite
from funnel_engine import Engine, FunnelTransformerConfig, convert
from funnel_engine.flops import forward_flops
from funnel_engine.funnel_transformer_config import EncoderConfig, require_model_config
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.hugging_face_config.funnel_transformer import DEFAULTS
from funnel_engine.packing import Ints
from funnel_engine.presets import FUNNEL_TRANSFORMERS, PRESETS, Fields, is_funnel_transformer
from funnel_kernels.errors import ConfigError, FunnelError, InputError
from funnel_kernels.target import check_backend

TORCH_DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # JAX's name -> PyTorch's
SCENARIOS = ("batch", "one")
# Peers that run a Funnel-Transformer; those that do without a decoder; and the fewest tokens that transformers runs.
ABLE = (*(f"hugging-face-{mode}" for mode in ("eager", "compiled", "frozen")), ENGINE)
ABLE_WITHOUT_DECODER = ("onnx-runtime", "openvino")
LEAST_TOKENS = 5
VOCABULARY = 2048  # ids are only looked up: how many there are has no part in what is timed
# Relative, between a vector and Hugging Face's in float32: bfloat16 makes 0.02, causal attention instead of
# bidirectional 0.5 to 1.3. int8 makes up to 0.4 (NNCF's, of 24 layers), which could hide such a mistake in a small
# model; but the same graph is measured in the other dtypes.
TOLERANCES = {"float32": 0.05, "bfloat16": 0.05, "int8": 0.6}
PADDED_TOLERANCE = 0.3  # of padded batches of a Funnel-Transformer: padding that is pooled with tokens makes 0.07


def model_fields(preset: str, depth: int | None) -> Fields:
    """The `config.json` of an encoder of a preset's shape, whole or only its first `depth` layers.

    A Gemma is bidirectional, as EmbeddingGemma is; another family has its own attention.

    Raises:
        ConfigError: no such preset, one that the peers have no encoder for, or more layers than it has.
    """
    if is_funnel_transformer(preset):
        if depth is not None:
            raise ConfigError(f"depth {depth} is not for a Funnel-Transformer, which runs all its layers; leave it out")
        return funnel_transformer_fields(preset)
    able = [name for name, fields in PRESETS.items() if fields["model_type"] in ARCHITECTURES]
    if preset not in able:
        able += FUNNEL_TRANSFORMERS
        raise ConfigError(f"preset {preset!r} has no peers: there are some for {', '.join(able)}; take one of these")
    fields = PRESETS[preset] | {"vocab_size": VOCABULARY, "pad_token_id": 0}
    if fields["model_type"].startswith("gemma"):
        fields |= {"use_bidirectional_attention": True}
    if depth is None:
        return fields
    check_depth(depth, preset, read_model_config(fields).num_layers)
    kinds = {"layer_types": fields["layer_types"][:depth]} if "layer_types" in fields else {}
    return fields | {"num_hidden_layers": depth} | kinds


def funnel_transformer_fields(preset: str) -> Fields:
    """The `config.json` of a Funnel-Transformer, with a decoder or, as "-base", without."""
    is_base = preset.endswith("-base")
    return {
        "model_type": "funnel",
        "architectures": ["FunnelBaseModel" if is_base else FUNNEL_TRANSFORMER],
        **DEFAULTS,
        **FUNNEL_TRANSFORMERS[preset.removesuffix("-base")],
        "vocab_size": VOCABULARY,
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Suite(BaseSuite):
    """What is measured: a cell for every batch of sequences, scenario and peer.

    Attributes:
        preset, depth, fields: the model's name and its layers, None for all; `config.json`, see `model_fields`.
        dtype: of the engine's weights: "bfloat16", as in the checkpoint, or what they are cast to.
        lengths: tokens of each sequence [B], by name.
        peers, scenarios: names in `PEERS` and `SCENARIOS`.
        order, batch_size: of the peers' batches, see `make_batches`.
        repeats: how often A B B A is run; each sequence by itself counts as one run.
        folder: for checkpoints; it is the caller's to remove.
        until: when a peer is ended, as `time.monotonic` counts.
        engines: by the folder of their weights.
        references: vectors of Hugging Face in float32, by the folder of weights and the name of the lengths.

    Raises:
        BackendUnavailable: the backend does not exist.
        InputError: a sequence that is longer than the model was made for.
    """

    preset: str
    depth: int | None
    dtype: str
    fields: Fields
    lengths: Mapping[str, Ints]
    peers: tuple[str, ...]
    scenarios: tuple[str, ...]
    order: str
    batch_size: int
    repeats: int
    backend: str
    folder: Path
    until: float = math.inf
    engines: dict[Path, Engine] = dataclasses.field(default_factory=dict)
    references: dict[tuple[Path, str], np.ndarray] = dataclasses.field(default_factory=dict)

    name = "peers"

    def __post_init__(self) -> None:
        check_backend(self.backend)
        longest, limit = max(int(lengths.max()) for lengths in self.lengths.values()), self.config.max_positions
        if longest > limit:
            raise InputError(
                f"the longest sequence has {longest} tokens, and the model was made for {limit}; take shorter sequences"
            )
        shortest = min(int(lengths.min()) for lengths in self.lengths.values())
        if self.is_funnel_transformer and shortest < LEAST_TOKENS:
            raise InputError(
                f"the shortest sequence has {shortest} tokens, but a Funnel-Transformer of transformers fails below "
                f"{LEAST_TOKENS}; take longer sequences, e.g. --lengths qnli"
            )

    @property
    def config(self) -> EncoderConfig:
        return read_encoder_config(self.fields)

    @property
    def is_funnel_transformer(self) -> bool:
        return isinstance(self.config, FunnelTransformerConfig)

    def options(self) -> Row:
        """Everything that a cell depends on beside its own name, as the head of a result file."""
        return {
            "preset": self.preset,
            "depth": self.depth,
            "dtype": self.dtype,
            "lengths": {
                name: {"sequences": len(lengths), **length_facts(lengths)} for name, lengths in self.lengths.items()
            },
            "order": self.order,
            "batch_size": self.batch_size,
            "repeats": self.repeats,
            "backend": self.backend,
            "seed": SEED,
        }

    def cells(self, results: Results) -> Iterator[Measurement]:
        """The cells of the suite. A row has, beside what `Results` puts there:

        peer, scenario, lengths     names
        sequences, tokens           of all
        facts                       what the peer says about itself: its `dtype`, versions
        agreement, peer_agreement   mean cosine of vectors to those of Hugging Face in float32
        seconds, peer_seconds       with samples: of all sequences, or of each by itself
        p90, peer_p90               seconds
        speedup                     {low, median, high} of peer_seconds / seconds, of calls that were made side by side
        tokens_per_second           of scenario "batch", as `flops_per_second`; `peer_tokens_per_second` and so on
        """
        for peer in self.peers:  # so that an engine is loaded once
            for name, lengths in self.lengths.items():
                for scenario in self.scenarios:
                    yield f"{name}; {scenario}; {peer}", partial(measure, self, peer, name, lengths, scenario)

    @classmethod
    def section(cls, content: Row) -> Section:
        """How many times as fast the engine is as each peer, by lengths of sequences."""
        rows, options = content["rows"], content["options"]
        shown = [scenario for scenario in SCENARIOS if any(row["scenario"] == scenario for row in rows)]
        versions = {row["peer"]: ", ".join(f"{name} {value}" for name, value in row["facts"].items()) for row in rows}
        order = "" if options["order"] == "sorted" else f", batches {options['order']}"
        layers = "all" if options["depth"] is None else options["depth"]
        model = (
            f"{options['preset']}, {layers} layers, {options['dtype']}, random weights; backend {options['backend']}"
        )
        what = ", ".join((options["preset"], options["dtype"], *options["lengths"]))
        return Section(
            title=f"Against other engines: {what}{order}",
            facts={
                "Model": model,
                "Lengths": "; ".join(describe_lengths(name, facts) for name, facts in options["lengths"].items()),
                "Peers' batches": f"at most {options['batch_size']} sequences, {options['order']} by length",
                "Repeats": f"{options['repeats']} times A B B A",
                "Compiling": "each peer compiles first, which takes up to minutes",
                **versions,
            },
            tables=[table(rows, scenario, options["dtype"]) for scenario in shown],
            plots=[plot(rows, scenario) for scenario in shown],
            summary="; ".join(summary(rows, scenario) for scenario in shown),
            reading=READING,
        )

    def source(self, peer: str) -> Path:
        """The folder that a peer reads, made when first asked for."""
        sentence = peer == SENTENCE
        folder = self.folder / ("sentence" if sentence else "encoder")
        if not folder.exists():
            (write_sentence_model if sentence else write_random_model)(folder, self.fields)
        return folder

    def engine(self, source: Path) -> Engine:
        """Ours with the weights of a source, made when first asked for."""
        if source not in self.engines:
            converted = source.with_name(f"{source.name} converted")
            convert(source, converted)
            dtype = None if self.dtype == DTYPE else self.dtype  # None: the engine chooses that of its activations
            self.engines[source] = Engine.load(converted, backend=self.backend, dtype=dtype)
        return self.engines[source]

    def reference(self, peer: str, name: str, task: Row) -> np.ndarray:
        """The vectors [B, D] of Hugging Face in float32, with the weights that a peer reads; made when first asked for.

        Args:
            task: the peer's.
        """
        key = Path(task["checkpoint"]), name
        if key not in self.references:
            kind = PEERS[peer if peer == SENTENCE else "hugging-face-eager"]
            task = task | kind.options | {"device": TORCH_DEVICES[jax.default_backend()], "dtype": "float32"}
            size = 1 if self.is_funnel_transformer else self.batch_size  # padding would change its results
            task["batches"] = make_batches(self.lengths[name], "sorted", size)
            with Peer(kind.module, until=self.until, **task) as reference:
                self.references[key] = in_order(task["batches"], reference.result)
        return self.references[key]


def measure(suite: Suite, peer_name: str, name: str, lengths: Ints, scenario: str) -> Row:
    kind, platform = PEERS[peer_name], jax.default_backend()
    if platform not in TORCH_DEVICES or (platform != "cpu" and kind.module is not hugging_face):
        raise LeftOut(f"JAX runs on {platform}, where this peer does not")
    if missing := next((package for package in COMMON + kind.packages if find_spec(package) is None), None):
        raise LeftOut(not_installed(missing))  # before a checkpoint of gigabytes is written
    if isinstance(suite.config, FunnelTransformerConfig):
        check_able(peer_name, suite.config)
    if kind.module is llama_cpp_peer:
        with leaving_out_what_it_lacks():
            gguf_file.architecture(require_model_config(suite.config, "llama.cpp"))
    dtype = dtype_beside(peer_name, suite.dtype, on_cpu=platform == "cpu")
    source = suite.source(peer_name)
    engine = suite.engine(source)
    sequences = random_sequences(lengths, suite.config.vocab_size)
    texts = peer_name == SENTENCE
    inputs: list[Any] = [text_of(ids) for ids in sequences] if texts else sequences
    parts: list[int | None]  # of the peer's batches, beside each call of ours
    if scenario == "one":
        batches, parts = make_batches(lengths, "unsorted", 1), list(range(len(lengths)))
        calls = [partial(engine.embed, [each], normalize=texts) for each in inputs]
    else:
        batches, parts = make_batches(lengths, suite.order, suite.batch_size), [None]
        calls = [partial(engine.embed, inputs, normalize=texts)]
    task = kind.options | {
        "checkpoint": str(source),
        "sequences": sequences,
        "batches": batches,
        "cores": usable_cores(),
        "device": TORCH_DEVICES[platform],
        "dtype": dtype,
        "float_dtype": "bfloat16" if multiplies_bfloat16() else "float32",
        "multiplies_int8": multiplies_int8(),
    }
    reference = suite.reference(peer_name, name, task)
    agreement = check_same("the engine's", suite.dtype, np.concatenate([call() for call in calls]), reference)
    with Peer(kind.module, until=suite.until, **task) as peer:
        is_padded = any(len(set(lengths[batch])) > 1 for batch in batches)
        at_least = PADDED_TOLERANCE if suite.is_funnel_transformer and is_padded else 0.0
        peer_agreement = check_same("the peer's", dtype, in_order(batches, peer.result), reference, at_least)
        pairs = [
            pair
            for call, part in zip(calls, parts, strict=True)
            for pair in sample_pairs(call, partial(peer.sample, part), suite.repeats)
        ]
    seconds, peer_seconds = (list(samples) for samples in zip(*pairs, strict=True))
    row = {
        "peer": peer_name,
        "scenario": scenario,
        "lengths": name,
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "facts": peer.facts,
        "agreement": agreement,
        "peer_agreement": peer_agreement,
        "seconds": spread(seconds),
        "peer_seconds": spread(peer_seconds),
        "p90": float(np.quantile(seconds, 0.9)),
        "peer_p90": float(np.quantile(peer_seconds, 0.9)),
        "speedup": quartiles([theirs / ours for ours, theirs in pairs])._asdict(),
    }
    return row | rates(engine, lengths, row) if scenario == "batch" else row


def check_able(peer: str, config: FunnelTransformerConfig) -> None:
    """Raises `LeftOut` unless a peer runs this Funnel-Transformer."""
    if peer in ABLE_WITHOUT_DECODER and config.decoder_layers:
        raise LeftOut(f"{peer} has no decoder: torch.export makes a graph for lengths of one kind only; take a -base")
    if peer not in ABLE + ABLE_WITHOUT_DECODER:
        raise LeftOut(f"{peer} has no Funnel-Transformer")


@contextlib.contextmanager
def leaving_out_what_it_lacks() -> Iterator[None]:
    """Leaves a peer out if it has no such model."""
    try:
        yield
    except ConfigError as error:
        raise LeftOut(str(error)) from None


def random_sequences(lengths: Ints, vocab_size: int) -> list[list[int]]:
    """Token ids of each sequence, the same for the same lengths."""
    generator = np.random.default_rng(SEED)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


def sample_pairs(ours: Call, peer: Sample, repeats: int) -> Iterator[tuple[float, float]]:
    """Seconds of our call and of the peer's, made in the order A B B A."""
    sample = sampler(ours, 0.0)  # one call each time
    with compiling_nothing():
        return zip(*interleave(sample, peer, repeats), strict=True)


def rates(engine: Engine, lengths: Ints, row: Row) -> Row:
    """What is done in a second; what a peer computes for padding is not counted."""
    tokens, flops = int(lengths.sum()), forward_flops(engine.config, engine.funnel, lengths)
    return {
        f"{whose}{what}_per_second": work / row[f"{whose}seconds"]["median"]
        for whose in ("", "peer_")
        for what, work in (("tokens", tokens), ("flops", flops))
    }


def check_same(whose: str, dtype: str, vectors: np.ndarray, reference: np.ndarray, at_least: float = 0.0) -> float:
    """The mean cosine of vectors to those of Hugging Face in float32, [B, D] each.

    Args:
        whose: they are, e.g. "the peer's".
        dtype: that they were computed in.
        at_least: how far they may differ if `TOLERANCES` allows less.

    Raises:
        FunnelError: they differ by more than that, so that times cannot be compared.
    """
    worst, limit = difference(vectors, reference), max(TOLERANCES[dtype], at_least)
    if not worst <= limit:
        raise FunnelError(
            f"{whose} result differs from Hugging Face's in float32 by {worst:.3g} of its size, more than the limit of "
            f"{limit:g} for {dtype}: it computes something else"
        )
    unit, reference_unit = (np.float64(rows) / size(rows)[:, None] for rows in (vectors, reference))
    return float((unit * reference_unit).sum(1).mean())


def difference(vectors: np.ndarray, reference: np.ndarray) -> float:
    """The greatest relative difference of two results [B, D], by rows: |vector - reference| / |reference|.

    Raises:
        FunnelError: they have different shapes.
    """
    if vectors.shape != reference.shape:
        raise FunnelError(f"a result is {vectors.shape} where {reference.shape} is expected: it is something else")
    return float((size(vectors.astype(np.float64) - reference) / size(reference)).max())


def size(rows: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(np.float64(rows), axis=1)
    return lengths


TITLES = {"batch": "all sequences", "one": "one sequence after another"}
READING = (
    "Both sides have the same random weights and inputs, and begin with token ids on the host "
    "(sentence-transformers with texts, and then so does the engine) and end with vectors on the host. They take "
    "turns, A B B A, the peer in a process of its own that sleeps in between. Times as fast is the median of the "
    "ratios of calls made side by side, with their quartiles; below 1 the peer is faster.",
    "All sequences: one call of ours, which packs them; the peer gets padded batches, but for llama.cpp, which packs "
    "too. Work on padding is not counted as useful. One sequence after another: latencies of single sequences, p50 and "
    "p90 over all of them.",
    "A peer computes in the dtype that its users would choose on this machine. Beside our bfloat16 that is bfloat16 "
    "where the processor multiplies it, and float32 elsewhere and for ONNX Runtime. Beside our int8 it is int8: "
    "OpenVINO's by NNCF, with ranges of activations from random ids; ONNX Runtime's and ours find them at run time.",
    "Agreement is the mean cosine of vectors to those of Hugging Face in float32. Vectors that differ from those by "
    "more than 0.05 of their size, in int8 by more than 0.6, are something else, and nothing is timed. In a "
    "Funnel-Transformer transformers pools padding with tokens, so padded batches agree less with each sequence alone; "
    "they may differ by 0.3.",
)


def milliseconds(name: str) -> Callable[[Row], Cell]:
    """The cell of a median, or of a number, of seconds."""

    def cell(row: Row) -> Cell:
        seconds = row[name]
        return number(seconds["median"] if isinstance(seconds, dict) else seconds, ",.1f", 1e3)

    return cell


AGREEMENT = (
    Column("agreement", field("agreement", ".5f"), note="cosine"),
    Column("peer's", field("peer_agreement", ".5f"), note="agreement"),
)
COLUMNS = {
    "batch": (
        Column("latency", milliseconds("seconds"), "ms"),
        Column("peer's", milliseconds("peer_seconds"), "ms"),
        Column("tokens/s", field("tokens_per_second", ",.0f")),
        Column("peer's", field("peer_tokens_per_second", ",.0f"), "tokens/s"),
        Column("GFLOP/s", field("flops_per_second", ",.1f", 1e-9), note="useful"),
        Column("peer's", field("peer_flops_per_second", ",.1f", 1e-9), "GFLOP/s"),
        *AGREEMENT,
    ),
    "one": (
        Column("p50", milliseconds("seconds"), "ms"),
        Column("peer's p50", milliseconds("peer_seconds"), "ms"),
        Column("p90", milliseconds("p90"), "ms"),
        Column("peer's p90", milliseconds("peer_p90"), "ms"),
        *AGREEMENT,
    ),
}


def table(rows: list[Row], scenario: str, dtype: str) -> Table:
    """The rows of a scenario; `dtype` is ours."""
    columns = (
        Column("peer", lambda row: Cell(row["peer"], row["lengths"]), note="and lengths"),
        Column("dtype", lambda row: Cell(dtype)),
        Column("peer's", lambda row: Cell(row["facts"]["dtype"]), note="dtype"),
        Column("times as fast", field("speedup", ".2f"), note="quartiles"),
        *COLUMNS[scenario],
    )
    return Table(TITLES[scenario].capitalize(), columns, [row for row in rows if row["scenario"] == scenario])


def describe_lengths(name: str, facts: Row) -> str:
    span = f"{facts['shortest']} to {facts['longest']}" if facts["shortest"] < facts["longest"] else facts["longest"]
    return f"{name}: {facts['sequences']} sequences of {span} tokens, {facts['tokens']:,} in all"


def summary(rows: list[Row], scenario: str) -> str:
    """Between which factors ours lies, over all peers and lengths of a scenario."""
    factors = {row["speedup"]["median"]: row for row in rows if row["scenario"] == scenario}
    least, most = factors[min(factors)], factors[max(factors)]
    ends = " to ".join(
        f"{row['speedup']['median']:.2f} ({row['peer']}, {row['lengths']})"
        for row in (least, most)[: 1 + (least is not most)]
    )
    return f"{TITLES[scenario].capitalize()}: {ends} times as fast as the peer"


def plot(rows: list[Row], scenario: str) -> Chart:
    mine = [row for row in rows if row["scenario"] == scenario]
    words = "; ".join(f"{row['peer']}, {row['lengths']}: {row['speedup']['median']:.2f}" for row in mine)
    names = [f"{row['peer']}, {row['lengths']}" for row in mine]
    series = [Series("measured (quartiles)", range(len(mine)), [row["speedup"] for row in mine])]
    return Chart(
        described=f"How many times as fast the engine is, {TITLES[scenario]}: {words}.",
        caption=f"{TITLES[scenario].capitalize()}: how many times as fast the engine is as each peer, with quartiles.",
        panels=[Panel(series, value_label="times as fast as the peer", rows=names, references={"both as fast": 1.0})],
    )
