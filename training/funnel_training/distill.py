"""Self-distillation: trains a checkpoint so that its vectors with a funnel are those that it has without.

The teacher is the checkpoint itself, unfunneled; the texts need no labels. Its vectors are computed once.
"""

import dataclasses
import importlib.metadata
import os
from typing import Any

import jax
import numpy as np

from funnel_engine import Engine, FunnelConfig
from funnel_engine.checkpoints.convert import prepare_destination, save
from funnel_engine.checkpoints.native import MANIFEST, read_source
from funnel_engine.checkpoints.source import Agreement, TrainingRecord
from funnel_engine.checkpoints.tensors import ArrayTensor
from funnel_engine.checks import check_integer
from funnel_engine.heads import SentenceVectors
from funnel_engine.input_files import hash_file, to_path
from funnel_engine.inputs import Ragged
from funnel_engine.text import read_tokenizer
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.data_files import read_file
from funnel_training.distill_loss import distillation_loss
from funnel_training.engines import check_untrained, read_checkpoint_as
from funnel_training.metrics import agreement
from funnel_training.run_folder import RunFolder
from funnel_training.statistics import CONFIDENCE, RESAMPLES
from funnel_training.student import Packs, Student
from funnel_training.trainer import Report, Run, Settings, Trainer, data_mesh

HELD_OUT_PART, MOST_HELD_OUT = 10, 1000  # a tenth of the texts, at most 1000, is held out of training
QUERY_PART = 5  # every fifth of these is a query
LEAST_TEXTS = 200
PACKAGES = ("funnel-engine", "jax", "jaxlib", "numpy", "optax")


def distill(
    checkpoint: str | os.PathLike[str],
    texts: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings,
    *,
    funnel: FunnelConfig | None = None,
    sizes: tuple[int, ...] = (),
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
        sizes: dimensions at which vectors are compared (Matryoshka); () is the whole vector.
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
        "sizes": list(sizes),
        "attention": opened.config.attention,
        "pooling": opened.head.pooling,
        "truncate": truncate,
        "settings": dataclasses.asdict(settings),
    }
    student = Student(
        opened.config,
        SentenceVectors(opened.head),
        funnel,
        settings.train,
        settings.rows,
        settings.texts,
        settings.dtype,
        data_mesh(settings.packs),
        settings.recompute,
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
    for size in sizes:
        check_integer("sizes", size, least=1, most=teacher.embedding_size)
    folder.open(run, resume=resume)
    if not folder.has_arrays("teacher"):
        report(f"computing the vectors of {len(lines):,} texts without a funnel")
        folder.write_arrays("teacher", teacher.embed(tokens))
    vectors = folder.read_arrays("teacher", 0)
    del teacher
    objective = Distillation(student, tokens, vectors, sizes, settings.packs, settings.seed)
    report(f"{len(objective.training):,} texts to train on, {len(objective.held_out):,} held out")
    trainer = Trainer(student, objective, settings, folder, opened.weights, report)
    trainer.run()
    agreed = with_interval(objective.overlaps, settings.seed)
    record = TrainingRecord(
        method="distill",
        source=manifest,
        data=file.sha256,
        loss=f"1 - cosine, and Kullback-Leibler divergence of similarities; weights: {settings.train}",
        steps=trainer.best_step,
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


class Distillation:
    """The student's vectors shall be the teacher's, see `Objective`."""

    def __init__(
        self,
        student: Student,
        tokens: Ragged,
        teacher: np.ndarray,  # [texts, D]
        sizes: tuple[int, ...],
        packs: int,
        seed: int,
    ):
        self.student, self.tokens, self.teacher, self.packs, self.seed = student, tokens, teacher, packs, seed
        self.sizes = sizes or (teacher.shape[1],)
        self.held_out, self.training = divide_texts(len(teacher), seed)
        self.overlaps = np.zeros(0)  # of the last evaluation, one of each query

    def batch(self, step: int) -> tuple[Packs, np.ndarray]:
        order = np.random.default_rng([self.seed, step]).permutation(self.training)
        packs = self.student.pack(self.tokens, self.student.fill(self.tokens, order, self.packs), self.packs)
        numbers = packs.texts.reshape(-1)
        return packs, np.where(numbers[:, None] >= 0, self.teacher[numbers], 0.0).astype(np.float32)

    def loss(self, outputs: jax.Array, packs: Packs, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        flat = outputs.reshape(-1, outputs.shape[-1])
        loss, cosine = distillation_loss(flat, targets, packs.texts.reshape(-1) >= 0, self.sizes)
        return loss, {"cosine": cosine}

    def evaluate(self, run: Run) -> dict[str, float]:
        vectors = np.zeros((len(self.held_out), self.teacher.shape[1]), np.float32)
        for packs in self.student.batches(self.tokens, self.held_out, self.packs):
            vectors[np.searchsorted(self.held_out, packs.texts[packs.texts >= 0])] = run(packs)[packs.texts >= 0]
        queries = np.arange(len(vectors))[::QUERY_PART]
        agreed = agreement(self.teacher[self.held_out], vectors, queries)
        self.overlaps = agreed.overlaps
        return {"overlap": agreed.overlap, "ndcg": agreed.ndcg, "held_out_cosine": agreed.cosine}


def divide_texts(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The texts that are held out of training, and the others; indices, ascending."""
    order = np.random.default_rng(seed).permutation(number).astype(np.int32)
    held_out = min(number // HELD_OUT_PART, MOST_HELD_OUT)
    return np.sort(order[:held_out]), np.sort(order[held_out:])


def with_interval(overlaps: np.ndarray, seed: int) -> Agreement:
    """The mean and its bootstrap interval."""
    drawn = np.random.default_rng(seed).integers(len(overlaps), size=(RESAMPLES, len(overlaps)))
    low, high = np.quantile(overlaps[drawn].mean(axis=1), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Agreement(float(overlaps.mean()), float(low), float(high))
