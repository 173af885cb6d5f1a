"""The fastest funnel whose loss of quality stays within a bound, on this machine and on given data.

Half of the units of a task search, the other half certify. The search is successive halving: many funnels on few units,
few funnels on many. Only the last ones are timed.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from funnel_engine import Engine, FunnelConfig
from funnel_engine.cli import show_progress
from funnel_engine.config import Funnel, parse_funnel
from funnel_engine.funnel_transformer_config import EncoderConfig, FunnelTransformerConfig
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.by_length import Outputs, cheapest_by_length
from funnel_training.candidates import computed_flops, grid, pools_more
from funnel_training.contenders import NO_FUNNEL, Contender, Run, funnel_contender, rivals
from funnel_training.engines import check_untrained, engine_maker, read_checkpoint_as
from funnel_training.evaluate import SEED, checkpoint_facts
from funnel_training.journal import Journal
from funnel_training.latency import ROUNDS, Latency, measure_in_turns
from funnel_training.package_versions import package_versions
from funnel_training.scores import Ints, Score
from funnel_training.statistics import CONFIDENCE, RESAMPLES, Ratio, Verdict, judge, paired_ratio, units_needed
from funnel_training.tasks.task import Task

FINALISTS = 6  # funnels that are timed
PROGRAMS = "programs"  # a folder of compiled programs: funnels that differ in positions or in kept tokens share them
LEAST_GAIN = 0.01  # of the FLOPs; a smaller one is not worth any loss, and timing would not show it
TIMED_TOKENS = {"cpu": 512}  # tokens of a timed batch, by platform
TIMED_TOKENS_ELSEWHERE = 16384
TIMED_PARTS = (1.0, 0.8)  # batches of several sizes, because each is padded to a bucket and so costs a bit too much

Measure = Callable[[Contender, Callable[[], Any], Callable[[], Any]], Latency]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is known of a contender.

    Attributes:
        kind, name, ideal, computed: see `Contender`.
        units: of the last rung that it ran on; 0 if it was not run.
        skipped: why it was not run.
        ratio: of the first score to the baseline's, on that rung.
        latency: relative to the baseline; None if it was not timed.
        held_out: the ratio on the held-out half, and its verdict; None if it was not tried there.
    """

    kind: str
    name: str
    ideal: float
    computed: float
    units: int = 0
    skipped: str | None = None
    ratio: Ratio | None = None
    latency: Latency | None = None
    held_out: Ratio | None = None
    verdict: Verdict | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of a search, and all that it depends on. `dataclasses.asdict` is its JSON.

    Attributes:
        checkpoint: the folder's name and the SHA-256 of the manifest, which has the hashes of the weights.
        data: the task, its files with their SHA-256, the score, the numbers of units of the rungs and held out.
        options: how the model ran, and the bound.
        statistics: how intervals were computed.
        versions: of the packages.
        winner: the fastest certified funnel; None if there is none.
        candidates: the funnels, one by length that was composed of them, if it is cheaper, then the rivals.
    """

    checkpoint: dict[str, str]
    data: dict[str, Any]
    options: dict[str, Any]
    statistics: dict[str, Any]
    versions: dict[str, str]
    winner: str | None
    candidates: list[Candidate]

    def timed(self) -> list["Timed"]:
        """Those that were timed, fastest first."""
        found = [Timed(each, each.ratio, each.latency) for each in self.candidates if each.ratio and each.latency]
        return sorted(found, key=lambda each: each.latency.ratio)

    def where_it_loses(self) -> list["Timed"]:
        """The rivals within the bound on the search half that are faster than the winner, or any if there is none.

        int8 weights are no such rival: a funnel can be used with them.
        """
        timed = self.timed()
        limit = min((each.latency.ratio for each in timed if each.candidate.name == self.winner), default=1.0)
        return [
            each
            for each in self.within_bound()
            if each.candidate.kind in ("layers", "tokens") and each.latency.ratio < limit
        ]

    def within_bound(self) -> list["Timed"]:
        """Those that were timed and keep the bound on the search half."""
        return [each for each in self.timed() if each.ratio.low >= 1 - self.options["max_loss"]]


class Timed(NamedTuple):
    """A contender that was timed."""

    candidate: Candidate
    ratio: Ratio
    latency: Latency


@dataclasses.dataclass(frozen=True)
class Rung:
    """A part of the data, and the unfunneled model on it. Nothing is computed before it is needed."""

    task: Task
    baseline: Engine
    truncate: bool

    @functools.cached_property
    def inputs(self) -> list[Any]:
        return self.task.inputs(self.baseline, self.truncate)

    @functools.cached_property
    def outputs(self) -> list[Any]:
        return self.task.outputs(self.baseline, self.inputs)

    @functools.cached_property
    def reference(self) -> dict[str, Score]:
        return self.task.scores(self.outputs, self.outputs)

    def ratio(self, run: Run) -> dict[str, float] | None:
        """The first score of a model relative to the baseline's, as JSON; None if that is not clearly above 0."""
        name, reference = next(iter(self.reference.items()))
        score = self.task.scores(run(self.task, self.inputs), self.outputs)[name]
        ratio = paired_ratio(reference, score, seed=SEED)
        return None if ratio is None else dataclasses.asdict(ratio)

    def baseline_facts(self) -> dict[str, Any]:
        """The name of the first score and its value, and whether a ratio to it has a meaning."""
        name, reference = next(iter(self.reference.items()))
        return {"score": name, "value": reference.value, "usable": paired_ratio(reference, reference) is not None}


def plan(
    checkpoint: str | os.PathLike[str],
    task: Task,
    *,
    max_loss: float,
    output: Path,
    resume: bool = False,
    funnels: Sequence[FunnelConfig] | None = None,
    attention: str | None = None,
    pooling: str | None = None,
    dtype: str | None = None,
    backend: str = "auto",
    truncate: bool = False,
    measure: Measure = lambda _, baseline, other: measure_in_turns(baseline, other),
) -> Plan:
    """Finds the fastest funnel whose first score on a task is at least `1 - max_loss` of the unfunneled model's.

    Args:
        checkpoint: a folder that `convert` wrote.
        task: what `tasks.pairs.read_pairs` and the other readers return.
        max_loss: 0.05 allows to lose 5 % of the score.
        output: a folder for what has been computed, which is made.
        resume: continue a run that was interrupted.
        funnels: the funnels to choose from; None is the checkpoint's own and `candidates.grid`.
        truncate: cut off the ends of texts that are too long.
        measure: takes a contender, a call of the baseline and one of the contender, and says how long they take.

    The other arguments are those of `Engine.load`.

    Raises:
        CheckpointError, ConfigError, BackendUnavailable: as `Engine.load`.
        ConfigError: the bound is not between 0 and 1, a funnel does not fit, the checkpoint was trained for a funnel,
            or the folder has another run.
        InputError: a text cannot be run, there are too few, or the unfunneled score is not clearly above 0.
    """
    order, half = task.order(SEED), count_half(task, max_loss)
    opened = read_checkpoint_as(checkpoint, attention=attention, pooling=pooling)
    if isinstance(opened.config, FunnelTransformerConfig):
        raise ConfigError(
            f"{checkpoint} is a Funnel-Transformer, which was trained for the funnel between its blocks, so there is "
            "none to find; `funnel bench latency --checkpoint` measures what its own one saves"
        )
    check_untrained(checkpoint, opened, "baseline")
    make_folder(output)
    make_engine = functools.partial(engine_maker, dtype=dtype, backend=backend, compilation_cache=output / PROGRAMS)
    make_funneled = make_engine(opened)
    baseline = make_funneled(NO_FUNNEL)
    own, head = opened.manifest.funnel, opened.head
    if funnels is None:
        reads_last = head.pooling == "last" or (head.task == "classify" and head.classifier_input == "last_token")
        recovery = "mean_last" if task.per_token else None
        funnels = [
            *(each for _, each in own.classes),
            *grid(baseline.config.num_layers, reads_last=reads_last, recovery=recovery),
        ]
    funnels = [funnel for funnel in dict.fromkeys(funnels) if funnel.total_stride > 1]
    lengths = np.concatenate([side.lengths for side in task.inputs(baseline, truncate)])
    contenders = [funnel_contender(baseline, make_funneled, funnel, lengths) for funnel in funnels]
    others = rivals(opened, baseline, task, lengths, make_engine)
    options = {
        "max_loss": max_loss,
        "attention": opened.config.attention,
        "pooling": head.pooling,
        "dtype": dtype or opened.dtype,
        "backend": backend,
        "truncate": truncate,
        "device": str(baseline.devices),
    }
    statistics = {
        "interval": "paired bootstrap",
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
        "rounds": ROUNDS,
    }
    versions = package_versions("scikit-learn", "scipy")
    facts = checkpoint_facts(checkpoint)
    journal = Journal(
        output,
        {
            "checkpoint": facts["manifest_sha256"],
            "data": task.files,
            **options,
            "grid": [contender.name for contender in contenders],
            "statistics": statistics,
            "versions": versions,
        },
        resume=resume,
    )

    def part(units: Ints, share: float) -> Rung:
        return Rung(task.take(units, share), baseline, truncate)

    rungs = [part(order[:size], size / half) for size in rung_sizes(half, task.least_units)]
    held_out = part(order[half:], 1.0)
    search = Search(rungs, held_out, journal, measure, max_loss)
    finalists = search.halve(search.start(contenders, nested=own == NO_FUNNEL))
    by_length = search.compose(finalists, baseline.config)
    composed = [] if by_length is None else [funnel_contender(baseline, make_funneled, by_length, lengths)]
    for each in show_progress([*composed, *others], "Scoring a funnel by length and rivals"):
        search.score(each, len(search.rungs) - 1)
    finalists += composed
    timed = [part(order[:size], size / half) for size in timed_sizes(rungs[-1], baseline)]
    for each in show_progress([*finalists, *others], "Timing"):
        search.time(each, baseline, timed)
    winner = search.certify(finalists)
    return Plan(
        checkpoint=facts,
        data={
            "task": task.kind,
            "files": task.files,
            "unit": task.unit,
            "score": search.score_name,
            "rungs": [rung.task.units for rung in search.rungs],
            "held_out": held_out.task.units,
            "tokens": int(lengths.sum()),
            "duplicates": task.duplicates,
        },
        options=options,
        statistics=statistics,
        versions=versions,
        winner=winner,
        candidates=[search.candidate(each) for each in [*contenders, *composed, *others]],
    )


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror or error}; choose another") from error


def count_half(task: Task, max_loss: float) -> int:
    """The number of units that search; the others certify.

    Raises:
        ConfigError: the bound is not between 0 and 1.
        InputError: there are too few.
    """
    half, least = task.units // 2, max(units_needed(max_loss), task.least_units)
    if half < least:
        raise InputError(
            f"{task.units} {task.unit} are too few: half of them search and half of them certify, and each half needs "
            f"{least} for max_loss={max_loss}; give at least {2 * least * task.lines_per_unit} different lines of data"
        )
    return half


def rung_sizes(half: int, least: int) -> list[int]:
    """Numbers of units from the least to half of all; each is at least twice the one before."""
    steps = int(np.log2(half / least))
    return [round(least * (half / least) ** (step / steps)) for step in range(steps)] + [half]


def timed_sizes(rung: Rung, baseline: Engine) -> list[int]:
    """Numbers of units with about as many tokens as are timed."""
    tokens = sum(side.lengths.sum() for side in rung.inputs)
    limit = TIMED_TOKENS.get(baseline.devices.device.platform, TIMED_TOKENS_ELSEWHERE)
    share = min(1.0, limit / tokens)
    return [max(1, int(part * share * rung.task.units)) for part in TIMED_PARTS]


class Search:
    """Successive halving, and what it has found out."""

    def __init__(self, rungs: list[Rung], held_out: Rung, journal: Journal, measure: Measure, max_loss: float):
        """
        Raises:
            InputError: the unfunneled score is not clearly above 0 on either half.
        """
        self.held_out, self.journal, self.measure, self.max_loss = held_out, journal, measure, max_loss
        self.known: dict[str, dict[str, Any]] = {}  # fields of `Candidate` by the contender's name
        facts = [
            journal.get(f"baseline: {rung.task.units} of {number}", rung.baseline_facts)
            for number, rung in enumerate([*rungs, held_out])
        ]
        self.score_name = facts[-1]["score"]
        for each in facts[-2:]:
            if not each["usable"]:
                raise InputError(
                    f"{self.score_name} without a funnel is {each['value']:.3f} on half of the data, which is not "
                    "clearly above 0, so there is nothing to lose; give more data, or data that this model is good at"
                )
        self.rungs = [rung for rung, each in zip(rungs, facts, strict=False) if each["usable"]]

    @property
    def bound(self) -> float:
        return 1 - self.max_loss

    def candidate(self, contender: Contender) -> Candidate:
        """All that is known of a contender."""
        return Candidate(
            contender.kind, contender.name, contender.ideal, contender.computed, **self.known.get(contender.name, {})
        )

    def score(self, contender: Contender, number: int) -> None:
        rung = self.rungs[number]
        ratio = self.compare(contender, rung, f"first {rung.task.units}")
        self.known.setdefault(contender.name, {}).update(units=rung.task.units, ratio=ratio)

    def compare(self, contender: Contender, rung: Rung, where: str) -> Ratio:
        return Ratio(**self.journal.get(f"{where}: {contender.name}", lambda: rung.ratio(contender.open())))

    def time(self, contender: Contender, baseline: Engine, timed: list[Rung]) -> None:
        def call(run: Run) -> Callable[[], Any]:
            return lambda: [run(part.task, part.inputs) for part in timed]

        def seconds() -> dict[str, float]:
            exact = call(lambda task, inputs: task.outputs(baseline, inputs))
            return dataclasses.asdict(self.measure(contender, exact, call(contender.open())))

        latency = Latency(**self.journal.get(f"latency: {contender.name}", seconds))
        self.known[contender.name]["latency"] = latency

    def ratio(self, contender: Contender) -> Ratio:
        return self.known[contender.name]["ratio"]

    def start(self, contenders: list[Contender], *, nested: bool) -> list[Contender]:
        """Runs funnels on the first rung, from the least pooling to the most, and skips those that cannot win.

        Without any quality only this is known: a funnel that computes as much as the unfunneled model cannot be faster.
        That it computes less than another funnel says nothing, because it may lose more.

        Args:
            nested: assume that a funnel loses no less than one that pools less at every layer, with the same options.
                So it is skipped once that one is clearly shown to lose too much. This holds for a checkpoint that was
                not trained for a funnel.

        Returns:
            Those that were run.
        """
        started: list[Contender] = []
        outside: list[FunnelConfig] = []
        units = f"{self.rungs[0].task.units} {self.rungs[0].task.unit}"
        title = f"Round 1 of {len(self.rungs)}, up to {len(contenders)} funnels on {units}"
        for each in show_progress(sorted(contenders, key=lambda each: -each.ideal), title):
            assert each.funnel is not None
            worse = next((other for other in outside if pools_more(each.funnel, other)), None)
            if each.computed > 1 - LEAST_GAIN:
                self.known[each.name] = {"skipped": "it saves nothing"}
            elif nested and worse is not None:
                self.known[each.name] = {"skipped": f"it pools more than {worse}, which loses too much"}
            else:
                self.score(each, 0)
                started.append(each)
                ratio = self.ratio(each)
                # One wrong funnel here would take many others with it, and there are some hundred intervals: so the
                # interval must lie below the bound by its own half width.
                if 2 * ratio.high - ratio.value < self.bound:
                    outside.append(each.funnel)
        return started

    def halve(self, contenders: list[Contender]) -> list[Contender]:
        """Runs fewer funnels on each further rung.

        A funnel that is shown to lose too much is dropped; of the others, those stay that no other one beats in both
        cost and quality, then those that only these beat, and so on.

        Returns:
            Those to be timed, see `finalists`.
        """
        left, steps = contenders, len(self.rungs)
        for number in range(1, steps):
            part = min(1.0, FINALISTS / max(1, len(contenders))) ** (number / steps)
            left = self.by_fronts(self.possible(left))[: round(part * len(contenders))]
            task = self.rungs[number].task
            title = f"Round {number + 1} of {steps}, {len(left)} funnels on {task.units} {task.unit}"
            for each in show_progress(left, title):
                self.score(each, number)
        return self.finalists(self.possible(left))

    def possible(self, contenders: list[Contender]) -> list[Contender]:
        """Those that are not shown to lose too much."""
        return [each for each in contenders if self.ratio(each).high >= self.bound]

    def by_fronts(self, contenders: list[Contender]) -> list[Contender]:
        """Non-dominated sorting: first those for which no other one is both cheaper and better, then the next ones."""
        ordered: list[Contender] = []
        left = sorted(contenders, key=lambda each: (each.computed, -self.ratio(each).value))
        while left:
            front: list[Contender] = []
            for each in left:
                if not front or self.ratio(each).value > self.ratio(front[-1]).value:
                    front.append(each)
            ordered += sorted(front, key=lambda each: -self.ratio(each).high)
            left = [each for each in left if each not in front]
        return ordered

    def finalists(self, contenders: list[Contender]) -> list[Contender]:
        """The safest one, then the cheapest of those that are within the bound, then the safest others."""
        safest = sorted(contenders, key=lambda each: -self.ratio(each).low)
        within = sorted((each for each in safest if self.ratio(each).low >= self.bound), key=lambda each: each.computed)
        return list({each.name: each for each in [*safest[:1], *within, *safest]}.values())[:FINALISTS]

    def compose(self, finalists: list[Contender], config: EncoderConfig) -> Funnel | None:
        """The cheapest funnel by length of finalists that keeps the bound on the search half.

        Returns:
            None if none is cheaper than every finalist that keeps the bound.
        """
        rung = self.rungs[-1]
        within = [each.funnel for each in finalists if each.funnel and self.ratio(each).low >= self.bound]
        begin_with = [NO_FUNNEL, *within]

        def keeps_bound(outputs: Outputs) -> bool:
            ratio = rung.ratio(lambda *_: outputs)
            return ratio is not None and ratio["low"] >= self.bound

        def find() -> str:
            lengths = [side.lengths for side in rung.inputs]
            outputs = {NO_FUNNEL: rung.outputs}
            for each in show_progress(finalists, "Composing a funnel by length"):
                if each.funnel:
                    outputs[each.funnel] = each.open()(rung.task, rung.inputs)
            found = cheapest_by_length(config, lengths, outputs, begin_with, keeps_bound)
            cost = {funnel: computed_flops(config, funnel, np.concatenate(lengths)) for funnel in (*begin_with, found)}
            is_cheaper = cost[found] <= min(cost[each] for each in begin_with) - LEAST_GAIN * cost[NO_FUNNEL]
            return str(found if is_cheaper else NO_FUNNEL)

        found = parse_funnel(self.journal.get("by length", find))
        return None if found == NO_FUNNEL else found

    def certify(self, finalists: list[Contender]) -> str | None:
        """Tries funnels on the held-out half, from the safest to the fastest, until one fails.

        This is a fixed-sequence test: the order is known before the held-out half is used, and a failure ends it. So
        the chance that any funnel is wrongly called "within" stays at that of a single test, 2.5 %. To try the next
        one after a failure would raise it with every try.

        Returns:
            The last one that is within the bound.
        """
        winner = None
        for each in self.sequence(finalists):
            ratio = self.compare(each, self.held_out, "held out")
            verdict = judge(ratio, self.held_out.task.units, self.max_loss)
            self.known[each.name].update(held_out=ratio, verdict=verdict)
            if verdict.kind != "within":
                break
            winner = each.name
        return winner

    def sequence(self, finalists: list[Contender]) -> list[Contender]:
        """The funnels to certify, in order: faster and worse one by one.

        They are within the bound on the search half, and no other one is both faster and better. If none is within the
        bound there, it is the one that comes closest.
        """
        faster = [each for each in finalists if self.known[each.name]["latency"].ratio < 1]
        within = [each for each in faster if self.ratio(each).low >= self.bound]
        if not within:
            hopeful = [each for each in faster if self.ratio(each).value >= self.bound]
            return sorted(hopeful, key=lambda each: -self.ratio(each).low)[:1]
        front: list[Contender] = []
        for each in sorted(within, key=lambda each: self.known[each.name]["latency"].ratio):
            if not front or self.ratio(each).value > self.ratio(front[-1]).value:
                front.append(each)
        return front[::-1]
