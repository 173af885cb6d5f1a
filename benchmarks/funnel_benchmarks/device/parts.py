"""The parts of a run on a device, in order of importance: a run that is short of time measures the first ones."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from funnel_benchmarks import suite_command
from funnel_benchmarks.device import profile
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.inputs import SEED
from funnel_benchmarks.kernels import command as kernels
from funnel_benchmarks.kernels.cases import (
    Case,
    Sizes,
    attention_case,
    cudnn_case,
    forward_case,
    padded_case,
    pool_case,
    recover_case,
)
from funnel_benchmarks.kernels.check import make_check
from funnel_benchmarks.kernels.layouts import Layout, equal, packed, up_to
from funnel_benchmarks.kernels.suite import backends_here, runs_mosaic
from funnel_benchmarks.latency.suite import Batch
from funnel_benchmarks.latency.suite import Suite as Latency
from funnel_benchmarks.lengths import draw
from funnel_benchmarks.models import Model, random_model
from funnel_benchmarks.peers.forms import FLASH
from funnel_benchmarks.peers.suite import VOCABULARY
from funnel_benchmarks.peers.suite import Suite as Peers
from funnel_benchmarks.results import Measurement
from funnel_engine import FunnelConfig
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.packing import Ints
from funnel_engine.presets import PRESETS, Fields
from funnel_kernels.errors import BackendUnavailable
from funnel_kernels.recover_norm import MODES

DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """How large everything is that gets measured: on an accelerator, and in a rehearsal on a CPU.

    Attributes:
        preset, fields: the model's name, and its config.json.
        batches: (sequences, tokens each), of as many tokens; the first is the one for everything but funnels.
        funnel_layers: full-length layers before the funnel.
        one: tokens of a single sequence.
        padding: per cent of a bucket, where that is measured.
        heads: (query heads, key/value heads) of attention, each with all lengths; the first is used for the variants.
        lengths: of sequences, for attention.
        strided, windows: lengths for queries on stride 2, and tokens that a window spans, for attention.
        xla_length: the one length at which XLA's attention is measured too: it keeps all scores.
        widths: of pool_norm and recover_norm; their largest array has `row_bytes`.
        repeats: how often A B B A is run.
    """

    preset: str
    fields: Fields
    batches: tuple[tuple[int, int], ...]
    funnel_layers: tuple[int, ...]
    one: int
    padding: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    strided: tuple[int, ...]
    windows: tuple[int, ...]
    xla_length: int
    widths: tuple[int, ...]
    row_bytes: int
    repeats: int

    @property
    def tokens(self) -> int:
        sequences, tokens = self.batches[0]
        return sequences * tokens


GEMMA_2B = PRESETS["gemma-2b"] | {"use_bidirectional_attention": True}
FULL = Extent(
    preset="gemma-2b",
    fields=GEMMA_2B,
    batches=((128, 512), (8, 8192)),
    funnel_layers=(2, 8, 14),
    one=128,
    padding=(7, 45),
    heads=((8, 1), (16, 16)),
    lengths=(512, 2048, 8192, 16384),
    strided=(2048, 8192),
    windows=(4096, 512),
    xla_length=2048,
    widths=(768, 2048),
    row_bytes=2**28,
    repeats=5,
)
SMALL = Extent(
    preset="rehearsal",
    fields=GEMMA_2B
    | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "head_dim": 32},
    batches=((8, 32), (2, 128)),
    funnel_layers=(1,),
    one=16,
    padding=(50,),
    heads=((4, 1),),
    lengths=(32, 128),
    strided=(32,),
    windows=(16,),
    xla_length=32,
    widths=(64,),
    row_bytes=2**15,
    repeats=1,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run.

    Attributes:
        backend: the one that is asked for.
        seed: of the checks.
        until: when no further measurement may begin, as `time.monotonic` counts.
    """

    extent: Extent
    backend: str
    seed: int | None
    until: float

    @functools.cached_property
    def model(self) -> Model:
        """All parts share its weights and engines."""
        return random_model(self.extent.preset, read_model_config(self.extent.fields), DTYPE)

    @property
    def small(self) -> bool:
        return self.extent is SMALL

    @property
    def batch(self) -> Sizes:
        sequences, tokens = self.extent.batches[0]
        return Sizes(self.model, np.full(sequences, tokens, np.int32), self.extent.row_bytes)

    @functools.cached_property
    def served(self) -> str:
        """The backend that is measured; of "auto" the best that serves the model, so that results name it.

        On Hopper it is "auto": there attention is Mosaic's and all else Triton's.
        """
        if self.backend == "auto" and runs_mosaic():
            return "auto"
        names = backends_here() if self.backend == "auto" else (self.backend,)
        for name in names[:-1]:
            with contextlib.suppress(BackendUnavailable):
                self.model.served_by([NO_FUNNEL], name)
                return name
        return names[-1]

    def shaped(self, **fields: Any) -> Model:
        """The model with other sizes, for ops that need no weights of it."""
        return dataclasses.replace(self.model, config=dataclasses.replace(self.model.config, **fields), made={})


def check(run: Run, json: Path) -> None:
    suite_command.run(make_check(run.backend, run.small, run.seed), json=json, until=run.until)


def measure(what: str, make: Callable[[Run], Iterable[Case]], run: Run, json: Path) -> None:
    """Measures cases of the kernels suite."""
    cases = list(make(run))
    kernels.run(
        f"{run.extent.preset}, {what}" if cases else what,
        cases,
        lengths=run.batch.lengths if cases else kernels.NO_LENGTHS,
        backends=(run.served,),
        repeats=run.extent.repeats,
        small=run.small,
        json=json,
        until=run.until,
    )


def attention_cases(run: Run) -> Iterator[Case]:
    """Dense, beside cuDNN's and at one length XLA's; then the first heads with strides, windows, padding and so on.

    On Hopper all of it is measured with both kernels.
    """
    extent, tokens = run.extent, run.extent.tokens
    own = ("mosaic", "triton") if run.served == "auto" else (run.served,)

    def ours(sizes: Sizes, layout: Layout, what: str, *others: str) -> Case:
        return attention_case(sizes, layout, what)._replace(backends=tuple(dict.fromkeys((*own, *others))))

    for heads, kv_heads in extent.heads:
        model = run.shaped(num_heads=heads, num_kv_heads=kv_heads)
        for length in extent.lengths:
            sizes = Sizes(model, equal(tokens, length))
            others = ("xla",) if length == extent.xla_length else ()
            case = ours(sizes, packed(sizes.lengths), f"sequences of {length} tokens", *others)
            yield case
            yield cudnn_case(sizes, case)
    heads, kv_heads = extent.heads[0]
    sizes = Sizes(run.shaped(num_heads=heads, num_kv_heads=kv_heads), equal(tokens, extent.lengths[0]))
    longest, mean = extent.lengths[-1], extent.lengths[0]
    for length in extent.strided:
        yield ours(sizes, packed(equal(tokens, length), stride=2), f"stride 2 of {length} tokens")
    for window in extent.windows:
        radii = window // 2, window // 2
        layout = packed(equal(tokens, longest), window=radii)
        yield ours(sizes, layout, f"{longest} tokens with a window of {window}")
    for percent in extent.padding:
        lengths = filled(tokens, mean, percent)
        layout = packed(lengths, padding=tokens - int(lengths.sum()))
        yield ours(sizes, layout, f"{mean} tokens with {percent} % padding")
    for name, lengths in ragged_lengths(tokens, mean).items():
        layout = packed(-np.sort(-lengths))  # longest first, as engines pack
        yield ours(sizes, layout, f"ragged sequences, {name}")


def row_cases(run: Run) -> Iterator[Case]:
    for width in run.extent.widths:
        sizes = dataclasses.replace(run.batch, model=run.shaped(hidden_size=width))
        for stride in (2, 4):
            yield pool_case(sizes, stride)
            yield from (recover_case(sizes, stride, mode) for mode in MODES)


def engine_cases(run: Run) -> Iterator[Case]:
    """A full bucket, and one that is partly padding."""
    batch = run.batch
    yield forward_case(batch)
    for percent in run.extent.padding:
        yield padded_case(batch, filled(batch.rows, int(batch.lengths[0]), percent))


def ragged_cases(run: Run) -> Iterator[Case]:
    """A full bucket of ragged sequences."""
    batch = run.batch
    for name in ("conll", "passage"):
        lengths = up_to(batch.rows, draw(name, batch.rows, SEED))
        yield forward_case(dataclasses.replace(batch, lengths=lengths), f" {name}")


def ragged_lengths(tokens: int, mean: int) -> dict[str, Ints]:
    """Lengths drawn evenly around a mean, and those of a data set; `tokens` in all."""
    even = np.random.default_rng(SEED).integers(1, 2 * mean, tokens).astype(np.int32)
    drawn = {f"even from 1 to {2 * mean - 1}": even, "passage": draw("passage", tokens, SEED)}
    return {name: up_to(tokens, lengths) for name, lengths in drawn.items()}


def filled(tokens: int, length: int, percent: int) -> Ints:
    """Lengths of sequences of `length` that leave about `percent` % of `tokens` rows empty."""
    return equal(tokens * (100 - percent) // 100, length)


def funnel(run: Run, json: Path) -> None:
    suite = Latency(
        model=run.model,
        funnels=tuple(map(FunnelConfig.after, run.extent.funnel_layers)),
        batches=tuple(Batch(np.full(*batch, np.int32)) for batch in run.extent.batches),
        backend=run.served,
        repeats=run.extent.repeats,
    )
    suite_command.run(suite, json=json, until=run.until)


def peer(run: Run, json: Path) -> None:
    sequences, tokens = run.extent.batches[0]
    with tempfile.TemporaryDirectory() as folder:
        suite = Peers(
            preset=run.extent.preset,
            depth=None,
            dtype="bfloat16",
            fields=run.extent.fields | {"vocab_size": VOCABULARY},
            lengths={str(tokens): np.full(sequences, tokens, np.int32)},
            peers=("hugging-face-compiled", FLASH),
            scenarios=("batch",),
            order="sorted",
            batch_size=sequences,
            repeats=run.extent.repeats,
            backend=run.served,
            folder=Path(folder),
            until=run.until,
        )
        suite_command.run(suite, json=json, until=run.until)


def profiled(measured: Callable[[profile.Suite], Iterator[Measurement]], run: Run, json: Path) -> None:
    suite = profile.Suite(
        measured=measured,
        model=run.model,
        batch=run.batch.lengths,
        one=run.extent.one,
        backend=run.served,
        repeats=run.extent.repeats,
    )
    suite_command.run(suite, json=json, until=run.until)


PARTS: dict[str, Callable[[Run, Path], None]] = {
    "check": check,
    "ceilings": partial(measure, kernels.BEST, lambda run: ()),
    "attention": partial(measure, "attention", attention_cases),
    "rows": partial(measure, "pooling and recovery", row_cases),
    "engine": partial(measure, "the whole engine", engine_cases),
    "funnel": funnel,
    "peer": peer,
    "latency": partial(profiled, profile.profiles),
    "ragged": partial(measure, "ragged sequences", ragged_cases),
    "flags": partial(profiled, profile.xla_options),
}
