"""Self-distillation: trains a checkpoint so that its vectors with a funnel are those that it has without.

The teacher is the checkpoint itself, unfunneled; the texts need no labels. Its vectors are computed once.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from funnel_engine.checkpoints.source import Agreement
from funnel_engine.checks import check_integer
from funnel_engine.config import Funnel
from funnel_engine.heads import SentenceVectors
from funnel_engine.input_files import to_path
from funnel_engine.inputs import Ragged
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.data_files import read_file
from funnel_training.distill_loss import distillation_loss
from funnel_training.engines import check_untrained
from funnel_training.metrics import agreement
from funnel_training.statistics import CONFIDENCE, RESAMPLES
from funnel_training.student import Packs, Student
from funnel_training.trainer import Report, Run, Settings, run_texts
from funnel_training.training_run import LEAST_UNITS, TrainingRun, divide

QUERY_PART = 5  # every fifth of the texts that are held out is a query


def distill(
    checkpoint: str | os.PathLike[str],
    texts: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings,
    *,
    funnel: Funnel | None = None,
    sizes: tuple[int, ...] = (),
    attention: str | None = None,
    pooling: str | None = None,
    truncate: bool = False,
    resume: bool = False,
    report: Report = lambda line: None,
) -> Agreement:
    """Trains a copy of a checkpoint for a funnel, and writes it with the funnel and a record of the training.

    A tenth of the texts is held out of training; the weights with the best agreement on them are written. See
    `TrainingRun` for what the run leaves.

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
    run = TrainingRun(checkpoint, output, settings, report, funnel=funnel, attention=attention, pooling=pooling)
    if run.funnel.total_stride == 1:
        raise ConfigError("a funnel to train for is missing; give one, e.g. --funnel 6:2/mean")
    check_untrained(run.source, run.opened, "teacher")
    file = read_file(to_path(texts))
    places: dict[str, str] = {}
    for place, line in file.lines():
        places.setdefault(line, place)
    if len(places) < LEAST_UNITS:
        raise InputError(f"{file.path.name} has {len(places)} different texts; give at least {LEAST_UNITS}")
    student = run.student(SentenceVectors(run.opened.head))
    teacher = run.engine(student)
    tokens = teacher.token_ids(list(places), truncate=truncate)
    for size in sizes:
        check_integer("sizes", size, least=1, most=teacher.embedding_size)
    run.open({"data": file.sha256, "sizes": list(sizes), "truncate": truncate}, resume=resume)
    if not run.folder.has_arrays("teacher"):
        report(f"computing the vectors of {len(places):,} texts without a funnel")
        run.folder.write_arrays("teacher", teacher.embed(tokens))
    vectors = run.folder.read_arrays("teacher", 0)
    del teacher
    objective = Distillation(student, list(places.values()), tokens, vectors, sizes, settings.packs, settings.seed)
    report(f"{len(objective.training):,} texts to train on, {len(objective.held_out):,} held out")
    trainer = run.trainer(student, objective)
    figures = trainer.run()
    agreed = with_interval(objective.overlaps, settings.seed)
    loss = "1 - cosine, and Kullback-Leibler divergence of similarities"
    run.write(trainer, figures, method="distill", data=file.sha256, loss=loss, agreement=agreed)
    run.folder.remove("teacher")
    return agreed


class Distillation:
    """The student's vectors shall be the teacher's, see `Objective`."""

    def __init__(
        self,
        student: Student,
        places: Sequence[str],
        tokens: Ragged,
        teacher: np.ndarray,  # [texts, D]
        sizes: tuple[int, ...],
        packs: int,
        seed: int,
    ):
        self.student, self.places, self.tokens, self.teacher = student, places, tokens, teacher
        self.packs, self.seed = packs, seed
        self.sizes = sizes or (teacher.shape[1],)
        self.held_out, self.training = divide(np.random.default_rng(seed).permutation(len(teacher)))
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
        vectors = run_texts(self.student, run, self.tokens, self.held_out, self.packs)
        queries = np.arange(len(vectors))[::QUERY_PART]
        agreed = agreement(self.teacher[self.held_out], vectors, queries)
        self.overlaps = agreed.overlaps
        return {"overlap": agreed.overlap, "ndcg": agreed.ndcg, "held_out_cosine": agreed.cosine}


def with_interval(overlaps: np.ndarray, seed: int) -> Agreement:
    """The mean and its bootstrap interval."""
    drawn = np.random.default_rng(seed).integers(len(overlaps), size=(RESAMPLES, len(overlaps)))
    low, high = np.quantile(overlaps[drawn].mean(axis=1), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Agreement(float(overlaps.mean()), float(low), float(high))
