"""Self-distillation: trains a checkpoint so that its vectors, or its rows, with a funnel are those that it has without.

The teacher is the checkpoint itself, unfunneled; the texts need no labels. What it computes is computed once.
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from funnel_engine import Engine, FunnelConfig, HeadConfig
from funnel_engine.checkpoints.native import Checkpoint
from funnel_engine.checkpoints.source import Agreement
from funnel_engine.checks import check_integer
from funnel_engine.config import Funnel
from funnel_engine.heads import SentenceVectors
from funnel_engine.input_files import to_path
from funnel_engine.inputs import Ragged
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.data_files import read_file
from funnel_training.distill_loss import distillation_loss
from funnel_training.distill_tokens import TokenDistillation, TokenOutputs
from funnel_training.engines import check_untrained
from funnel_training.metrics import agreement
from funnel_training.statistics import CONFIDENCE, RESAMPLES
from funnel_training.student import Packs, Student
from funnel_training.teacher import TaughtTexts, TeacherCache, hash_texts, in_parts
from funnel_training.trainer import Objective, Report, Run, Settings, run_texts
from funnel_training.training_run import LEAST_UNITS, TrainingRun, hold_out

QUERY_PART = 5  # every fifth of the texts that are held out is a query
MOST_DOCUMENTS = 2**14  # that a text of a step is compared with
LOSS = "1 - cosine, and Kullback-Leibler divergence of similarities to the teacher's vectors"
TOKEN_LOSS = "relative squared error of rows, and Kullback-Leibler divergence of labels if it tags"


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
    per_token: bool = False,
    teacher_cache: str | os.PathLike[str] | None = None,
    resume: bool = False,
    report: Report = lambda line: None,
) -> Agreement | None:
    """Trains a copy of a checkpoint for a funnel, and writes it with the funnel and a record of the training.

    A tenth of the texts is held out of training; the weights with the best agreement on them are written, see
    `TokenDistillation.evaluate` for that of tokens, and `TrainingRun` for what the run leaves.

    Args:
        checkpoint: a folder that `convert` wrote.
        texts: a UTF-8 file with a text in each line.
        output: the folder of the new checkpoint.
        funnel: None takes the checkpoint's own.
        sizes: dimensions at which vectors are compared (Matryoshka); () is the whole vector.
        attention, pooling: as in `Engine.load`; the new checkpoint keeps them.
        truncate: cut off the ends of texts that are longer than `settings.rows` or than the model allows.
        per_token: train the rows of all tokens, and a tagger's labels, instead of a vector for each text. The funnel
            must have a recovery.
        teacher_cache: a folder with what the teacher computes; it is written if it is not there. Runs with other
            funnels or settings can share it. None keeps it in OUTPUT.training until the end.
        resume: continue a run that was stopped.
        report: called with each line for people.

    Returns:
        The agreement of the written checkpoint with the teacher on the held-out texts; None with `per_token`.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the output cannot be written.
        ConfigError: an option is wrong, the teacher's cache is of another checkpoint or of other texts, or the loss is
            not finite.
        InputError: the texts cannot be used, or the disk is full.
    """
    run = TrainingRun(checkpoint, output, settings, report, funnel=funnel, attention=attention, pooling=pooling)
    if run.funnel.total_stride == 1:
        raise ConfigError("a funnel to train for is missing; give one, e.g. --funnel 6:2/mean")
    check_untrained(run.source, run.opened, "teacher")
    head = run.opened.head
    check_outputs(head, run.funnel, sizes, per_token)
    file = read_file(to_path(texts))
    places: dict[str, str] = {}
    for place, line in file.lines():
        places.setdefault(line, place)
    if len(places) < LEAST_UNITS:
        raise InputError(f"{file.path.name} has {len(places)} different texts; give at least {LEAST_UNITS}")
    student = run.student(TokenOutputs(head) if per_token else SentenceVectors(head))
    teacher = run.engine(student, "float32")
    tokens = teacher.token_ids(list(places), truncate=truncate)
    for size in sizes:
        check_integer("sizes", size, least=1, most=teacher.embedding_size)
    cache = TeacherCache(
        run.folder.path / "teacher" if teacher_cache is None else to_path(teacher_cache),
        {
            "checkpoint": run.manifest,
            "texts": hash_texts(tokens),
            "attention": run.opened.config.attention,
            "outputs": "rows of tokens" if per_token else f"vectors, pooling {head.pooling}",
        },
    )
    if teacher_cache is not None:
        cache.check()
    facts = {"data": file.sha256, "sizes": list(sizes), "truncate": truncate, "per_token": per_token}
    run.open(facts, resume=resume)
    if not cache.check():
        what = "rows of all tokens" if per_token else "vectors"
        report(f"computing the {what} of {len(places):,} texts without a funnel")
        cache.write(teacher_outputs(teacher, tokens, per_token))
    width = run.opened.config.hidden_size if per_token else teacher.embedding_size
    del teacher
    rows = cache.read(len(tokens.ids) if per_token else len(places), width)
    held_out, training = hold_out(np.random.default_rng(settings.seed).permutation(len(places)))
    report(f"{len(training):,} texts to train on, {len(held_out):,} held out")
    taught = TaughtTexts(list(places.values()), tokens, rows, held_out, training)
    objective: Objective
    if per_token:
        objective = TokenDistillation(student, taught, classifier_of(run.opened), settings)
    else:
        objective = Distillation(student, taught, sizes, settings)
    trainer = run.trainer(student, objective)
    figures = trainer.run()
    agreed = with_interval(objective.overlaps, settings.seed) if isinstance(objective, Distillation) else None
    loss = TOKEN_LOSS if per_token else LOSS
    run.write(trainer, figures, method="distill", data=file.sha256, loss=loss, agreement=agreed)
    shutil.rmtree(run.folder.path / "teacher", ignore_errors=True)
    return agreed


def teacher_outputs(teacher: Engine, tokens: Ragged, per_token: bool) -> Iterator[np.ndarray]:
    """A row for each token or for each text, part by part."""
    for part in in_parts(tokens):
        yield np.concatenate(teacher.hidden_states(part)) if per_token else teacher.embed(part)


def classifier_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The weights of a tagger's classifier, by name, in float32; empty for other checkpoints."""
    names = [name for name in checkpoint.weights if name.startswith("classifier.")]
    return {n: np.asarray(checkpoint.weights[n], np.float32) for n in names if checkpoint.head.task == "tag"}


def check_outputs(head: HeadConfig, funnel: FunnelConfig, sizes: tuple[int, ...], per_token: bool) -> None:
    """Raises `ConfigError` if the funnel, the head or another option does not fit what is trained."""
    if per_token and funnel.output_stride > 1:
        raise ConfigError(
            f"funnel {funnel} has no row for each token, which training per token needs; add a recovery, as in "
            f"{funnel}/mean_last"
        )
    if per_token and sizes:
        raise ConfigError(f"sizes={sizes} are of sentence vectors; leave them out of training per token")
    if head.task == "classify" and head.classifier_input == "last_token":
        raise ConfigError(
            "the classifier of this checkpoint reads the row of the last token, which distillation does not train; "
            "train it on labels: funnel finetune --labels"
        )
    if head.task == "tag" and not per_token:
        raise ConfigError(
            "this checkpoint tags tokens, but without per_token (--per-token) its sentence vectors would be trained; "
            "give it"
        )


class Distillation:
    """Trains the student's vectors to be the teacher's, see `Objective`."""

    def __init__(self, student: Student, texts: TaughtTexts, sizes: tuple[int, ...], settings: Settings):
        self.student, self.texts, self.settings, self.places = student, texts, settings, texts.places
        self.sizes = sizes or (texts.teacher.shape[1],)
        self.overlaps = np.zeros(0)  # of the last evaluation, one of each query
        documents = np.random.default_rng(settings.seed).permutation(texts.training)[:MOST_DOCUMENTS]
        self.documents = np.array(texts.teacher[documents])
        self.document_of = np.full(len(texts.teacher), -1, np.int32)  # by the number of the text
        self.document_of[documents] = np.arange(len(documents))

    def batch(self, step: int) -> tuple[Packs, tuple[np.ndarray, ...]]:
        packs = self.texts.draw(self.student, self.settings, step)
        numbers = packs.texts.reshape(-1)
        is_text = numbers >= 0
        teacher = np.where(is_text[:, None], self.texts.teacher[numbers], 0.0).astype(np.float32)
        return packs, (teacher, self.documents, np.where(is_text, self.document_of[numbers], -1))

    def loss(self, outputs: jax.Array, packs: Packs, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        student, counts = outputs.reshape(-1, outputs.shape[-1]), packs.texts.reshape(-1) >= 0
        teacher, documents, places = targets
        loss, cosine = distillation_loss(student, teacher, documents, places, counts, self.sizes)
        return loss, {"cosine": cosine}

    def evaluate(self, run: Run) -> dict[str, float]:
        held_out = self.texts.held_out
        vectors = run_texts(self.student, run, self.texts.tokens, held_out, self.settings.packs)
        queries = np.arange(len(vectors))[::QUERY_PART]
        agreed = agreement(self.texts.teacher[held_out], vectors, queries)
        self.overlaps = agreed.overlaps
        return {"overlap": agreed.overlap, "ndcg": agreed.ndcg, "held_out_cosine": agreed.cosine}


def with_interval(overlaps: np.ndarray, seed: int) -> Agreement:
    """The mean and its bootstrap interval."""
    drawn = np.random.default_rng(seed).integers(len(overlaps), size=(RESAMPLES, len(overlaps)))
    low, high = np.quantile(overlaps[drawn].mean(axis=1), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Agreement(float(overlaps.mean()), float(low), float(high))
