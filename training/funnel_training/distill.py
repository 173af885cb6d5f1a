"""Self-distillation: trains a checkpoint so that its vectors with a funnel are those that it has without.

The teacher is the checkpoint itself, unfunneled; the texts need no labels. Its vectors are computed once.
"""

import dataclasses
import importlib.metadata
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from funnel_engine import Engine, FunnelConfig
from funnel_engine.checkpoints.convert import prepare_destination, save
from funnel_engine.checkpoints.native import MANIFEST, read_source
from funnel_engine.checkpoints.source import Agreement, TrainingRecord
from funnel_engine.checkpoints.tensors import ArrayTensor
from funnel_engine.checks import check_integer, check_number
from funnel_engine.input_files import hash_file, to_path
from funnel_engine.inputs import Ragged
from funnel_engine.text import read_tokenizer
from funnel_engine.weights import check_dtype
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.data_files import read_file
from funnel_training.distill_loss import distillation_loss
from funnel_training.distill_plot import draw
from funnel_training.engines import check_untrained, read_checkpoint_as
from funnel_training.metrics import agreement
from funnel_training.run_folder import RunFolder
from funnel_training.statistics import CONFIDENCE, RESAMPLES
from funnel_training.student import Packs, Student, Weights

HELD_OUT_PART, MOST_HELD_OUT = 10, 1000  # a tenth of the texts, at most 1000, is held out of training
QUERY_PART = 5  # every fifth of these is a query
LEAST_TEXTS = 200
PACKAGES = ("funnel-engine", "jax", "jaxlib", "numpy", "optax")
Report = Callable[[str], None]


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
        sizes: dimensions at which vectors are compared (Matryoshka); () is the whole vector.
        dtype: of activations, "float32" or "bfloat16". Weights that are trained are float32.
        seed: of everything random.

    Raises:
        ConfigError: a value is outside its range.
    """

    steps: int
    train: str = "after"
    learning_rate: float = 1e-4
    rows: int = 1024
    packs: int = 1
    texts: int = 128
    every: int = 50
    patience: int = 5
    sizes: tuple[int, ...] = ()
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "packs", "every", "patience"):
            check_integer(name, getattr(self, name), least=1)
        check_integer("texts", self.texts, least=2)
        check_integer("seed", self.seed, least=0)
        check_number("learning_rate", self.learning_rate)
        check_dtype(self.dtype)

    def optimizer(self) -> optax.GradientTransformation:
        warmup = min(100, max(1, self.steps // 10))
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(self.steps, warmup + 1), self.learning_rate / 10
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))


@dataclasses.dataclass
class State:
    """What a run continues from. Arrays only, so that it is a tree that can be written."""

    step: Any
    trained: Weights
    optimizer: Any
    best: Any  # the best overlap on held-out texts, its step, and evaluations since then, [3] float64

    def tree(self) -> tuple[Any, ...]:
        return self.step, self.trained, self.optimizer, self.best


def distill(
    checkpoint: str | os.PathLike[str],
    texts: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings,
    *,
    funnel: FunnelConfig | None = None,
    attention: str | None = None,
    pooling: str | None = None,
    truncate: bool = False,
    resume: bool = False,
    report: Report = lambda line: None,
) -> Agreement:
    """Trains a copy of a checkpoint for a funnel, and writes it with the funnel and a record of the training.

    The state of the run, its log (log.jsonl) and a plot are in the folder OUTPUT.training, which stays. The weights
    with the best agreement on the held-out texts are written.

    Args:
        checkpoint: a folder that `convert` wrote.
        texts: a UTF-8 file with a text in each line.
        output: the folder of the new checkpoint.
        funnel: None takes the checkpoint's own.
        attention, pooling: as in `Engine.load`; the new checkpoint keeps them.
        truncate: cut off the ends of texts that are longer than `settings.rows` or than the model allows.
        resume: continue a run that was stopped.
        report: called with each line for people.

    Returns:
        The agreement of the written checkpoint with the teacher on the held-out texts.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the output cannot be written.
        ConfigError: an option is wrong, or the loss is not finite.
        InputError: the texts cannot be used, or the disk is full.
    """
    source, destination = to_path(checkpoint), to_path(output)
    destination = prepare_destination(destination, source, False)
    opened = read_checkpoint_as(source, attention=attention, pooling=pooling)
    funnel = opened.manifest.funnel if funnel is None else funnel
    if funnel.total_stride == 1:
        raise ConfigError("a funnel to train for is missing; give one, e.g. --funnel 6:2/mean")
    check_untrained(source, opened, "teacher")
    file = read_file(to_path(texts))
    lines = list(dict.fromkeys(line for _, line in file.lines()))
    if len(lines) < LEAST_TEXTS:
        raise InputError(f"{file.path.name} has {len(lines)} different texts; give at least {LEAST_TEXTS}")
    folder = RunFolder(destination.with_name(f"{destination.name}.training"))
    manifest = hash_file(source / MANIFEST)
    run = {
        "checkpoint": manifest,
        "data": file.sha256,
        "funnel": str(funnel),
        "attention": opened.config.attention,
        "pooling": opened.head.pooling,
        "truncate": truncate,
        "settings": dataclasses.asdict(settings),
    }
    mesh = data_mesh(settings.packs)
    student = Student(
        opened.config, opened.head, funnel, settings.train, settings.rows, settings.texts, settings.dtype, mesh
    )
    teacher = Engine(
        opened.config,
        opened.head,
        opened.weights,
        tokenizer=read_tokenizer(opened.tokenizer_file) if opened.tokenizer_file else None,
        text=opened.manifest.text,
        max_batch_tokens=student.rows - funnel.lead,
        dtype="float32",
    )
    tokens = teacher.token_ids(lines, truncate=truncate)
    check_sizes(settings.sizes, teacher.embedding_size)
    folder.open(run, resume=resume)
    if not folder.has_arrays("teacher"):
        report(f"computing the vectors of {len(lines):,} texts without a funnel")
        folder.write_arrays("teacher", teacher.embed(tokens))
    vectors = folder.read_arrays("teacher", 0)
    del teacher
    trainer = Trainer(student, settings, folder, tokens, vectors, opened.weights, report)
    agreed = trainer.run()
    record = TrainingRecord(
        method="distill",
        source=manifest,
        data=file.sha256,
        loss=f"1 - cosine, and Kullback-Leibler divergence of similarities; weights: {settings.train}",
        steps=int(trainer.state.best[1]),
        agreement=agreed,
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
    )
    changed = {name: ArrayTensor.of(name, np.asarray(array), source) for name, array in trainer.best_weights().items()}
    model = read_source(source)
    model = dataclasses.replace(
        model,
        config=opened.config,
        head=opened.head,
        weights={**model.weights, **changed},
        funnel=funnel,
        training=record,
    )
    save(model, destination, opened.dtype)
    folder.remove("state", "best", "teacher")
    return agreed


class Trainer:
    """One run, from its state on the disk, if there is one, to the best weights."""

    def __init__(
        self,
        student: Student,
        settings: Settings,
        folder: RunFolder,
        tokens: Ragged,
        teacher: np.ndarray,  # [texts, D]
        weights: Any,
        report: Report,
    ):
        self.student, self.settings, self.folder, self.report = student, settings, folder, report
        self.tokens, self.teacher = tokens, teacher
        order = np.random.default_rng(settings.seed).permutation(len(teacher)).astype(np.int32)
        held_out = min(len(order) // HELD_OUT_PART, MOST_HELD_OUT)
        self.held_out, self.training = np.sort(order[:held_out]), np.sort(order[held_out:])
        self.weights = weights
        trained, self.frozen = student.divide(weights, settings.seed)
        self.optimizer = settings.optimizer()
        # Nothing is better yet than overlap -1.
        self.state = State(np.int64(0), trained, self.optimizer.init(trained), np.array([-1.0, 0.0, 0.0]))
        if folder.has_arrays("state"):
            self.state = State(*folder.read_arrays("state", self.state.tree()))
        self.vectors = jax.jit(student.vectors)
        self.sizes = settings.sizes or (teacher.shape[1],)

    def run(self) -> Agreement:
        """Trains until the last step or until it no longer helps; returns the agreement of the best weights."""
        step, first = int(self.state.step), int(self.state.step) + 1
        entries = self.folder.entries(step)
        packs = self.packs(step + 1)
        program = jax.jit(self.update).lower(*self.arguments(packs)).compile()
        self.report(self.plan(program, packs))
        if not entries:
            self.evaluate(entries)
        while step < self.settings.steps and self.state.best[2] < self.settings.patience:
            step += 1
            begin = time.perf_counter()
            packs = self.packs(step)
            trained, optimizer, loss, cosine = program(*self.arguments(packs))
            if not math.isfinite(loss):
                numbers = packs.texts[packs.texts >= 0].tolist()
                raise self.diverged(f"the loss of step {step} is {float(loss)}, on the texts {numbers!s:.60} (from 0)")
            self.state = State(np.int64(step), trained, optimizer, self.state.best)
            seconds = time.perf_counter() - begin
            entry = {"step": step, "loss": float(loss), "cosine": float(cosine), "seconds": round(seconds, 3)}
            entries.append(entry)
            self.folder.log(entry)
            if step == first:
                minutes = seconds * (self.settings.steps - step) / 60
                self.report(f"a step takes {seconds:.2f} s, the others {minutes:.0f} min")
            if step % self.settings.every == 0 or step == self.settings.steps:
                self.evaluate(entries)
        best = self.folder.read_arrays("best", self.state.trained)
        vectors = self.held_out_vectors(best)
        agreed = agreement(self.teacher[self.held_out], vectors, self.queries())
        return with_interval(agreed.overlaps, self.settings.seed)

    def update(
        self, trained: Weights, optimizer: Any, frozen: Weights, packs: Packs, teacher: jax.Array
    ) -> tuple[Weights, Any, jax.Array, jax.Array]:
        """One step."""

        def loss_of(trained: Weights) -> tuple[jax.Array, jax.Array]:
            student = self.student.vectors(trained, frozen, packs)
            flat = student.reshape(-1, student.shape[-1])
            return distillation_loss(flat, teacher, packs.texts.reshape(-1) >= 0, self.sizes)

        (loss, cosine), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, optimizer = self.optimizer.update(gradients, optimizer, trained)
        return optax.apply_updates(trained, updates), optimizer, loss, cosine

    def arguments(self, packs: Packs) -> tuple[Any, ...]:
        numbers = packs.texts.reshape(-1)
        teacher = np.where(numbers[:, None] >= 0, self.teacher[numbers], 0.0).astype(np.float32)
        return self.state.trained, self.state.optimizer, self.frozen, packs, teacher

    def packs(self, step: int) -> Packs:
        """The texts of a step, which depend on the seed and the step alone."""
        order = np.random.default_rng([self.settings.seed, step]).permutation(self.training)
        groups = self.student.fill(self.tokens, order, self.settings.packs)
        groups += [np.zeros(0, np.int32)] * (self.settings.packs - len(groups))
        return self.student.pack(self.tokens, groups)

    def queries(self) -> np.ndarray:
        return np.arange(len(self.held_out))[::QUERY_PART]

    def held_out_vectors(self, trained: Weights) -> np.ndarray:
        """The student's vectors of the held-out texts, in their order."""
        order = self.held_out[np.argsort(-self.tokens.lengths[self.held_out], kind="stable")]
        groups = self.student.fill(self.tokens, order)
        groups += [np.zeros(0, np.int32)] * (-len(groups) % self.settings.packs)
        vectors = np.zeros((len(self.teacher), self.teacher.shape[1]), np.float32)
        for start in range(0, len(groups), self.settings.packs):
            packs = self.student.pack(self.tokens, groups[start : start + self.settings.packs])
            found = np.asarray(self.vectors(trained, self.frozen, packs))
            vectors[packs.texts[packs.texts >= 0]] = found[packs.texts >= 0]
        return vectors[self.held_out]

    def evaluate(self, entries: list[dict[str, Any]]) -> None:
        """Compares with the teacher on the held-out texts, keeps the best weights, and writes the state."""
        state, step = self.state, int(self.state.step)
        vectors = self.held_out_vectors(state.trained)
        if not np.isfinite(vectors).all():
            raise self.diverged(f"the vectors after step {step} are not finite")
        agreed = agreement(self.teacher[self.held_out], vectors, self.queries())
        best, _, since = state.best
        is_best = agreed.overlap > best
        state.best = np.array([agreed.overlap, step, 0.0]) if is_best else np.array([best, state.best[1], since + 1])
        if is_best:
            self.folder.write_arrays("best", state.trained)
        entry = {
            "step": step,
            "overlap": agreed.overlap,
            "ndcg": agreed.ndcg,
            "held_out_cosine": agreed.cosine,
            "is_best": bool(is_best),
        }
        entries.append(entry)
        self.folder.log(entry)
        self.folder.write_arrays("state", state.tree())
        draw(entries, self.folder.path / "progress.png")
        losses = [entry["loss"] for entry in entries[-self.settings.every :] if "loss" in entry]
        loss = f", loss {np.mean(losses):.4f}" if losses else ""
        self.report(f"step {step}: overlap {agreed.overlap:.3f}, cosine {agreed.cosine:.4f} on held-out texts{loss}")

    def diverged(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what}: training has diverged. The last good state is kept in {self.folder.path}; begin again with a "
            "lower learning rate, or look at these texts"
        )

    def best_weights(self) -> Weights:
        """The trained weights of the best evaluation, as plain arrays by name."""
        best = self.folder.read_arrays("best", self.state.trained)
        merged = self.student.merge(best, {name: jnp.asarray(self.weights[name]) for name in best})
        return {name: merged[name] for name in best}

    def plan(self, program: Any, packs: Packs) -> str:
        """What the run will take, for people."""
        numbers = packs.texts[packs.texts >= 0]
        lengths, settings = self.tokens.lengths[numbers], self.settings
        memory = program.memory_analysis()
        gigabytes = (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes) / 1e9
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.state.trained))
        return (
            f"{settings.steps - int(self.state.step):,} steps of about {len(numbers):,} texts and {lengths.sum():,} "
            "tokens; "
            f"{len(self.training):,} texts to train on, {len(self.held_out):,} held out; {trained:,} weights move; "
            f"{gigabytes:.1f} GB"
        )


def with_interval(overlaps: np.ndarray, seed: int) -> Agreement:
    """The mean and its bootstrap interval."""
    drawn = np.random.default_rng(seed).integers(len(overlaps), size=(RESAMPLES, len(overlaps)))
    low, high = np.quantile(overlaps[drawn].mean(axis=1), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Agreement(float(overlaps.mean()), float(low), float(high))


def data_mesh(packs: int) -> Mesh:
    """All devices of the default platform along "data".

    Raises:
        ConfigError: the packs of a step cannot be divided among them.
    """
    devices = jax.devices()
    if packs % len(devices):
        raise ConfigError(f"packs={packs} must be a multiple of the {len(devices)} devices")
    return Mesh(np.array(devices), ("data",))


def check_sizes(sizes: tuple[int, ...], width: int) -> None:
    for size in sizes:
        check_integer("sizes", size, least=1, most=width)
