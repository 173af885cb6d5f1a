"""The peers suite: `Engine.embed` against other engines with the same weights and token ids.

Each peer sleeps in a process of its own until it is asked for a call, so ours and its calls alternate, A B B A. Before
anything is timed both results are compared: a peer that computes something else is not timed. Both begin with token ids
on the host (sentence-transformers with texts, and then so does ours) and end with vectors on the host.

There are two scenarios: "batch" embeds all sequences in one call of ours, and in the peer's batches; "one" embeds one
sequence after another, whose latencies are the samples.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from funnel_benchmarks.charts import Chart, Panel, Series
from funnel_benchmarks.inputs import SEED
from funnel_benchmarks.lengths import length_facts
from funnel_benchmarks.machine import multiplies_bfloat16, usable_cores
from funnel_benchmarks.measure import Call, Sample, compiling_nothing, sampler, spread
from funnel_benchmarks.models import check_depth
from funnel_benchmarks.peers import exported_graph, hugging_face, llama_cpp_peer, sentence_transformers_peer
from funnel_benchmarks.peers.batches import in_order, make_batches
from funnel_benchmarks.peers.peer import Peer
from funnel_benchmarks.peers.peer_process import not_installed
from funnel_benchmarks.peers.sentence_model import text_of, write_sentence_model
from funnel_benchmarks.random_checkpoint import ARCHITECTURES, DTYPE, write_random_model
from funnel_benchmarks.results import LeftOut, Measurement, Results, Row
from funnel_benchmarks.statistics import interleave, quartiles
from funnel_benchmarks.suite import Cell, Column, Section, Table, field, number
from funnel_benchmarks.suite import Suite as BaseSuite
from funnel_engine import Engine, FunnelConfig, ModelConfig, convert
from funnel_engine.flops import forward_flops
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.packing import Ints
from funnel_engine.presets import PRESETS, Fields
from funnel_kernels.errors import ConfigError, FunnelError, InputError
from funnel_kernels.target import check_backend

PEERS: dict[str, tuple[ModuleType, Row]] = {
    **{f"hugging-face-{mode}": (hugging_face, {"mode": mode}) for mode in hugging_face.MODES},
    "sentence-transformers": (sentence_transformers_peer, {}),
    "onnx-runtime": (exported_graph, {"runtime": "onnx"}),
    "openvino": (exported_graph, {"runtime": "openvino"}),
    "llama-cpp": (llama_cpp_peer, {}),
}
NEEDED = {hugging_face: ("torch", "transformers")}
FLASH = "hugging-face-flash"  # of GPUs only
TORCH_DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # JAX's name -> PyTorch's
SCENARIOS = ("batch", "one")
VOCABULARY = 2048  # ids are only looked up: how many there are has no part in what is timed
# Relative, between two vectors: rounding in other places makes 0.02, causal attention instead of bidirectional 0.7.
TOLERANCE = 0.05


def model_fields(preset: str, depth: int | None) -> Fields:
    """The `config.json` of a bidirectional model of a preset's shape, whole or only its first `depth` layers.

    Raises:
        ConfigError: no such preset, one that the peers have no bidirectional encoder for, or more layers than it has.
    """
    able = [name for name, fields in PRESETS.items() if fields["model_type"] in ARCHITECTURES]
    if preset not in able:
        raise ConfigError(f"preset {preset!r} has no peers: there are some for {', '.join(able)}; take one of these")
    fields = PRESETS[preset] | {"use_bidirectional_attention": True, "vocab_size": VOCABULARY}
    if depth is None:
        return fields
    check_depth(depth, preset, fields["num_hidden_layers"])
    kinds = {"layer_types": fields["layer_types"][:depth]} if "layer_types" in fields else {}
    return fields | {"num_hidden_layers": depth} | kinds


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Suite(BaseSuite):
    """What is measured: a cell for every batch of sequences, scenario and peer.

    Attributes:
        preset, depth, fields: the model's name and its layers, None for all; `config.json`, see `model_fields`.
        lengths: tokens of each sequence [B], by name.
        peers, scenarios: names in `PEERS` and `SCENARIOS`.
        order, batch_size: of the peers' batches, see `make_batches`.
        repeats: how often A B B A is run; each sequence by itself counts as one run.
        folder: for checkpoints; it is the caller's to remove.
        until: when a peer is ended, as `time.monotonic` counts.
        engines: by the folder of their weights.

    Raises:
        BackendUnavailable: the backend does not exist.
        InputError: a sequence that is longer than the model was made for.
    """

    preset: str
    depth: int | None
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

    name = "peers"
    dtype = DTYPE

    def __post_init__(self) -> None:
        check_backend(self.backend)
        longest, limit = max(int(lengths.max()) for lengths in self.lengths.values()), self.config.max_positions
        if longest > limit:
            raise InputError(
                f"the longest sequence has {longest} tokens, and the model was made for {limit}; take shorter sequences"
            )

    @property
    def peer_dtype(self) -> str:
        """What a peer's users would choose on this machine, where the peer leaves them the choice."""
        return "bfloat16" if jax.default_backend() != "cpu" or multiplies_bfloat16() else "float32"

    @property
    def config(self) -> ModelConfig:
        return read_model_config(self.fields)

    def options(self) -> Row:
        """Everything that a cell depends on beside its own name, as the head of a result file."""
        return {
            "preset": self.preset,
            "depth": self.depth,
            "dtype": self.dtype,
            "peer_dtype": self.peer_dtype,
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
        difference                  of two vectors, the largest, relative
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
        return Section(
            title=f"Against other engines: {options['preset']}, {', '.join(options['lengths'])}{order}",
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
        sentence = peer == "sentence-transformers"
        folder = self.folder / ("sentence" if sentence else "encoder")
        if not folder.exists():
            (write_sentence_model if sentence else write_random_model)(folder, self.fields)
        return folder

    def engine(self, source: Path) -> Engine:
        """Ours with the weights of a source, made when first asked for."""
        if source not in self.engines:
            converted = source.with_name(f"{source.name} converted")
            convert(source, converted)
            self.engines[source] = Engine.load(converted, backend=self.backend)
        return self.engines[source]


def measure(suite: Suite, peer_name: str, name: str, lengths: Ints, scenario: str) -> Row:
    module, options = PEERS[peer_name]
    platform = jax.default_backend()
    if module is hugging_face and platform in TORCH_DEVICES:
        options = options | {"device": TORCH_DEVICES[platform]}
    elif platform != "cpu":
        raise LeftOut(f"JAX runs on {platform}, where this peer does not")
    if missing := next((name for name in NEEDED.get(module, ()) if find_spec(name) is None), None):
        raise LeftOut(not_installed(missing))  # before a checkpoint of gigabytes is written
    source = suite.source(peer_name)
    engine = suite.engine(source)
    sequences = random_sequences(lengths, suite.config.vocab_size)
    texts = module is sentence_transformers_peer
    inputs: list[Any] = [text_of(ids) for ids in sequences] if texts else sequences
    parts: list[int | None]  # of the peer's batches, beside each call of ours
    if scenario == "one":
        batches, parts = make_batches(lengths, "unsorted", 1), list(range(len(lengths)))
        calls = [partial(engine.embed, [each], normalize=texts) for each in inputs]
    else:
        batches, parts = make_batches(lengths, suite.order, suite.batch_size), [None]
        calls = [partial(engine.embed, inputs, normalize=texts)]
    task = {"checkpoint": str(source), "sequences": sequences, "batches": batches, "cores": usable_cores()}
    with Peer(module, until=suite.until, **task, dtype=suite.peer_dtype, **options) as peer:
        apart = check_same(np.concatenate([call() for call in calls]), in_order(batches, peer.result))
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
        "difference": apart,
        "seconds": spread(seconds),
        "peer_seconds": spread(peer_seconds),
        "p90": float(np.quantile(seconds, 0.9)),
        "peer_p90": float(np.quantile(peer_seconds, 0.9)),
        "speedup": quartiles([theirs / ours for ours, theirs in pairs])._asdict(),
    }
    return row | rates(engine.config, lengths, row) if scenario == "batch" else row


def random_sequences(lengths: Ints, vocab_size: int) -> list[list[int]]:
    """Token ids of each sequence, the same for the same lengths."""
    generator = np.random.default_rng(SEED)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


def sample_pairs(ours: Call, peer: Sample, repeats: int) -> Iterator[tuple[float, float]]:
    """Seconds of our call and of the peer's, made in the order A B B A."""
    sample = sampler(ours, 0.0)  # one call each time
    with compiling_nothing():
        return zip(*interleave(sample, peer, repeats), strict=True)


def rates(config: ModelConfig, lengths: Ints, row: Row) -> Row:
    """What is done in a second; what a peer computes for padding is not counted."""
    tokens, flops = int(lengths.sum()), forward_flops(config, FunnelConfig(), lengths)
    return {
        f"{whose}{what}_per_second": work / row[f"{whose}seconds"]["median"]
        for whose in ("", "peer_")
        for what, work in (("tokens", tokens), ("flops", flops))
    }


def check_same(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The greatest relative difference of two results [B, D], by rows: |ours - theirs| / |theirs|.

    Raises:
        FunnelError: it is more than `TOLERANCE`, so that their times cannot be compared.
    """
    if ours.shape != theirs.shape:
        raise FunnelError(f"the peer's result is {theirs.shape} where ours is {ours.shape}: it computes something else")
    apart = np.linalg.norm(np.float64(ours) - np.float64(theirs), axis=1) / np.linalg.norm(np.float64(theirs), axis=1)
    if not (worst := float(apart.max())) <= TOLERANCE:
        raise FunnelError(
            f"the results differ by {worst:.3g} of their size, more than the limit of {TOLERANCE:g}: the peer, or the "
            "engine, computes something else"
        )
    return worst


TITLES = {"batch": "all sequences", "one": "one sequence after another"}
READING = (
    "Both sides have the same random weights and inputs, and begin with token ids on the host "
    "(sentence-transformers with texts, and then so does the engine) and end with vectors on the host. They take "
    "turns, A B B A, the peer in a process of its own that sleeps in between. Times as fast is the median of the "
    "ratios of calls made side by side, with their quartiles; below 1 the peer is faster.",
    "All sequences: one call of ours, which packs them; the peer gets padded batches, but for llama.cpp, which packs "
    "too. A peer computes in bfloat16 where the processor multiplies it and in float32 elsewhere, but for ONNX Runtime "
    "(always float32) and llama.cpp (always bfloat16). Work on padding is not counted as useful. One sequence after "
    "another: latencies of single sequences, p50 and p90 over all of them.",
    "Apart is the greatest relative difference between a vector of ours and the peer's: rounding to bfloat16 in other "
    "places. A peer that is further apart than 0.05 computes something else, and is not timed.",
)


def milliseconds(name: str) -> Callable[[Row], Cell]:
    """The cell of a median, or of a number, of seconds."""

    def cell(row: Row) -> Cell:
        seconds = row[name]
        return number(seconds["median"] if isinstance(seconds, dict) else seconds, ",.1f", 1e3)

    return cell


APART = Column("apart", field("difference", ".3f"), note="relative")
COLUMNS = {
    "batch": (
        Column("latency", milliseconds("seconds"), "ms"),
        Column("peer's", milliseconds("peer_seconds"), "ms"),
        Column("tokens/s", field("tokens_per_second", ",.0f")),
        Column("peer's", field("peer_tokens_per_second", ",.0f"), "tokens/s"),
        Column("GFLOP/s", field("flops_per_second", ",.1f", 1e-9), note="useful"),
        Column("peer's", field("peer_flops_per_second", ",.1f", 1e-9), "GFLOP/s"),
        APART,
    ),
    "one": (
        Column("p50", milliseconds("seconds"), "ms"),
        Column("peer's p50", milliseconds("peer_seconds"), "ms"),
        Column("p90", milliseconds("p90"), "ms"),
        Column("peer's p90", milliseconds("peer_p90"), "ms"),
        APART,
    ),
}


def table(rows: list[Row], scenario: str, dtype: str) -> Table:
    """The rows of a scenario; `dtype` is ours."""
    columns = (
        Column("peer", lambda row: Cell(row["peer"], row["lengths"]), note="and lengths"),
        Column("dtype", lambda row: Cell(dtype, row["facts"]["dtype"]), note="peer's below"),
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
