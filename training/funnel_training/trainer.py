"""The loop that all kinds of training share: steps, evaluations on held-out data, and a state that survives a stop."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from funnel_engine.checks import check_flag, check_integer, check_number
from funnel_engine.inputs import Ragged
from funnel_engine.messages import abbreviate
from funnel_engine.packing import Ints
from funnel_engine.weights import ACTIVATIONS, check_dtype
from funnel_kernels.errors import ConfigError
from funnel_training.progress_plot import draw
from funnel_training.run_folder import RunFolder
from funnel_training.student import Packs, Student, Weights

Report = Callable[[str], None]
Run = Callable[[Packs], np.ndarray]  # the student's outputs with some weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        steps: number of optimizer steps.
        train: which weights move, see `Student`.
        learning_rate: the highest; it rises to it over a tenth of the steps (at most 100) and falls to a tenth of it
            along a cosine.
        rows: packed rows that are computed at once; memory grows with them.
        packs: packs of this many rows in a step; a multiple of the number of devices.
        texts: the largest number of texts in a pack.
        every: steps from one evaluation on the held-out texts, and from one saved state, to the next.
        patience: training ends when this many evaluations in a row have not been better than the best.
        dtype: of activations, "float32" or "bfloat16". Weights that are trained are float32.
        recompute: compute each layer again for its derivative, in place of keeping its activations: less memory, more
            time.
        seed: of everything random.

    Raises:
        ConfigError: a value is outside its range.
    """

    steps: int
    train: str = "after"
    learning_rate: float = 2e-5
    rows: int = 1024
    packs: int = 1
    texts: int = 128
    every: int = 50
    patience: int = 5
    dtype: str = "float32"
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "packs", "every", "patience"):
            check_integer(name, getattr(self, name), least=1)
        check_integer("texts", self.texts, least=2)
        check_integer("seed", self.seed, least=0)
        check_number("learning_rate", self.learning_rate)
        check_dtype(self.dtype, ACTIVATIONS)
        check_flag("recompute", self.recompute)

    def optimizer(self) -> optax.GradientTransformation:
        warmup = min(100, max(1, self.steps // 10))
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(self.steps, warmup + 1), self.learning_rate / 10
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))


class Objective(Protocol):
    """What a run trains for: its data, its loss, and what it measures on data held out of training.

    Attributes:
        places: where each text is from, for messages, by its number.
    """

    places: Sequence[str]

    def batch(self, step: int) -> tuple[Packs, Any]:
        """The packs of a step and the arrays that the loss compares with; always of the same shapes.

        They depend on the step alone, so that a run that was stopped continues with the same data.
        """

    def loss(self, outputs: jax.Array, packs: Packs, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, and further figures for the log, by name; scalars."""

    def evaluate(self, run: Run) -> dict[str, float]:
        """Figures on the held-out data, by name. The first one chooses the weights: larger is better."""


@dataclasses.dataclass
class State:
    """What a run continues from. Arrays only, so that it is a tree that can be written."""

    step: Any
    trained: Weights
    optimizer: Any
    best: Any  # the best figure on held-out data, its step, and evaluations since then, [3] float64

    def tree(self) -> tuple[Any, ...]:
        return self.step, self.trained, self.optimizer, self.best


class Trainer:
    """One run, from its state on the disk, if there is one, to the best weights."""

    def __init__(
        self,
        student: Student,
        objective: Objective,
        settings: Settings,
        folder: RunFolder,
        weights: Mapping[str, Any],
        report: Report,
    ):
        self.student, self.objective, self.settings = student, objective, settings
        self.folder, self.weights, self.report = folder, weights, report
        trained, self.frozen = student.divide(weights, settings.seed)
        self.optimizer = settings.optimizer()
        # Nothing is better yet than no figure.
        self.state = State(np.int64(0), trained, self.optimizer.init(trained), np.array([-np.inf, 0.0, 0.0]))
        if folder.has_arrays("state"):
            self.state = State(*folder.read_arrays("state", self.state.tree()))
        self.outputs = jax.jit(student.outputs)

    def run(self) -> dict[str, float]:
        """Trains until the last step or until it no longer helps; returns the figures of the best weights.

        Raises:
            ConfigError: the loss or an output is not finite.
            InputError: the disk is full.
        """
        step, first = int(self.state.step), int(self.state.step) + 1
        is_new = not self.folder.has_arrays("state")
        entries = self.folder.entries(-1 if is_new else step)
        batch = self.objective.batch(first)
        lowered = jax.jit(self.update).lower(self.state.trained, self.state.optimizer, self.frozen, *batch)
        program = lowered.compile(compiler_options=self.student.compiler_options)
        self.report(self.describe(program, batch[0]))
        if is_new:
            self.evaluate(entries)
        while step < self.settings.steps and self.state.best[2] < self.settings.patience:
            step += 1
            begin = time.perf_counter()
            packs, targets = self.objective.batch(step)
            trained, optimizer, loss, figures = program(
                self.state.trained, self.state.optimizer, self.frozen, packs, targets
            )
            if not math.isfinite(loss):
                places = abbreviate([self.objective.places[number] for number in packs.texts[packs.texts >= 0]])
                raise self.diverged(f"the loss of step {step} is {float(loss)}, on the texts {', '.join(places)}")
            self.state = State(np.int64(step), trained, optimizer, self.state.best)
            seconds = time.perf_counter() - begin
            entry = {"step": step, "loss": float(loss), **floats(figures), "seconds": round(seconds, 3)}
            entries.append(entry)
            self.folder.log(entry)
            if step == first:
                minutes = seconds * (self.settings.steps - step) / 60
                self.report(f"a step takes {seconds:.2f} s, the others {minutes:.0f} min")
            if step % self.settings.every == 0 or step == self.settings.steps:
                self.evaluate(entries)
        return self.objective.evaluate(self.runner(self.folder.read_arrays("best", self.state.trained)))

    def update(
        self, trained: Weights, optimizer: Any, frozen: Weights, packs: Packs, targets: Any
    ) -> tuple[Weights, Any, jax.Array, dict[str, jax.Array]]:
        """One step."""

        def loss_of(trained: Weights) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self.objective.loss(self.student.outputs(trained, frozen, packs), packs, targets)

        (loss, figures), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, optimizer = self.optimizer.update(gradients, optimizer, trained)
        return optax.apply_updates(trained, updates), optimizer, loss, figures

    def runner(self, trained: Weights) -> Run:
        def run(packs: Packs) -> np.ndarray:
            outputs = np.asarray(self.outputs(trained, self.frozen, packs))
            if not np.isfinite(outputs).all():
                raise self.diverged(f"outputs after step {int(self.state.step)} are not finite")
            return outputs

        return run

    def evaluate(self, entries: list[dict[str, Any]]) -> None:
        """Measures on the held-out data, keeps the best weights, and writes the state."""
        state, step = self.state, int(self.state.step)
        figures = self.objective.evaluate(self.runner(state.trained))
        figure = next(iter(figures.values()))
        best, _, since = state.best
        is_best = figure > best
        state.best = np.array([figure, step, 0.0]) if is_best else np.array([best, state.best[1], since + 1])
        if is_best:
            self.folder.write_arrays("best", state.trained)
        entry = {"step": step, **figures, "is_best": bool(is_best)}
        entries.append(entry)
        self.folder.log(entry)
        self.folder.write_arrays("state", state.tree())
        draw(entries, self.folder.path / "progress.png")
        losses = [entry["loss"] for entry in entries[-self.settings.every :] if "loss" in entry]
        loss = f", loss {np.mean(losses):.4f}" if losses else ""
        measured = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.report(f"step {step}: {measured} on held-out texts{loss}")

    def diverged(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what}: training has diverged. The last good state is kept in {self.folder.path}; begin again with a "
            "lower learning rate, or look at these texts"
        )

    @property
    def best_step(self) -> int:
        return int(self.state.best[1])

    def best_weights(self) -> Weights:
        """The trained weights of the best evaluation, as plain arrays by name."""
        best = self.folder.read_arrays("best", self.state.trained)
        return self.student.merge(best, {name: self.weights[name] for name in best}, np.float32)

    def describe(self, program: Any, packs: Packs) -> str:
        """What the run will take, for people."""
        texts, tokens = (packs.texts >= 0).sum(), packs.batch.levels[1].real.sum()
        memory = program.memory_analysis()
        gigabytes = (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes) / 1e9
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.state.trained))
        return (
            f"{self.settings.steps - int(self.state.step):,} steps of about {texts:,} texts and {tokens:,} tokens; "
            f"{trained:,} weights move; {gigabytes:.1f} GB"
        )


def run_texts(student: Student, run: Run, texts: Ragged, numbers: Ints, packs: int) -> np.ndarray:
    """What a head that reads texts returns for those with these numbers, which ascend; [numbers, ...]."""
    found, outputs = [], []
    for batch in student.batches(texts, numbers, packs):
        real = batch.texts >= 0
        found.append(batch.texts[real])
        outputs.append(run(batch)[real])
    return np.concatenate(outputs)[np.argsort(np.concatenate(found))]


def floats(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def data_mesh(packs: int) -> Mesh:
    """All devices of the default platform along "data".

    Raises:
        ConfigError: the packs of a step cannot be divided among them.
    """
    devices = jax.devices()
    if packs % len(devices):
        raise ConfigError(f"packs={packs} must be a multiple of the {len(devices)} devices")
    return Mesh(np.array(devices), ("data",))
