"""Self-distillation: trains a checkpoint so that its vectors, or its rows, with a funnel are those that it has without.

The teacher is the checkpoint itself, unfunneled; the texts need no labels. What it computes is computed once.
"""

import dataclasses
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
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
from funnel_training.distill_tokens import TokenDistillation, TokenOutputs
from funnel_training.engines import check_untrained, read_checkpoint_as
from funnel_training.metrics import agreement
from funnel_training.run_folder import RunFolder
from funnel_training.statistics import CONFIDENCE, RESAMPLES
from funnel_training.student import Packs, Student
from funnel_training.teacher import TeacherCache, hash_texts, in_parts
from funnel_training.trainer import Objective, Report, Run, Settings, Trainer, data_mesh

HELD_OUT_PART, MOST_HELD_OUT = 10, 1000  # a tenth of the texts, at most 1000, is held out of training
QUERY_PART = 5  # every fifth of these is a query
LEAST_TEXTS = 200
LOSS = "1 - cosine, and Kullback-Leibler divergence of similarities"
TOKEN_LOSS = "relative squared error of rows, and Kullback-Leibler divergence of labels if it tags"
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
    per_token: bool = False,
    teacher_cache: str | os.PathLike[str] | None = None,
    resume: bool = False,
    report: Report = lambda line: None,
) -> Agreement | None:
    """Trains a copy of a checkpoint for a funnel, and writes it with the funnel and a record of the training.

    The state of the run, its log (log.jsonl) and a plot are in the folder OUTPUT.training, which stays. The weights
    with the best agreement on the held-out texts are written; see `TokenDistillation.evaluate` for that of tokens.

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
    source, destination = to_path(checkpoint), to_path(output)
    destination = prepare_destination(destination, source, False)
    opened = read_checkpoint_as(source, attention=attention, pooling=pooling)
    funnel = opened.manifest.funnel if funnel is None else funnel
    if funnel.total_stride == 1:
        raise ConfigError("a funnel to train for is missing; give one, e.g. --funnel 6:2/mean")
    check_untrained(source, opened, "teacher")
    check_outputs(opened.head.task, funnel, sizes, per_token)
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
        "per_token": per_token,
        "settings": dataclasses.asdict(settings),
    }
    student = Student(
        opened.config,
        TokenOutputs(opened.head) if per_token else SentenceVectors(opened.head),
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
    cache = TeacherCache(
        folder.path / "teacher" if teacher_cache is None else to_path(teacher_cache),
        {
            "checkpoint": manifest,
            "texts": hash_texts(tokens),
            "attention": opened.config.attention,
            "outputs": "rows of tokens" if per_token else f"vectors, pooling {opened.head.pooling}",
        },
    )
    if teacher_cache is not None:
        cache.check()
    folder.open(run, resume=resume)
    if not cache.check():
        what = "rows of all tokens" if per_token else "vectors"
        report(f"computing the {what} of {len(lines):,} texts without a funnel")
        cache.write(teacher_outputs(teacher, tokens, per_token))
    width = opened.config.hidden_size if per_token else teacher.embedding_size
    del teacher
    rows = cache.read(len(tokens.ids) if per_token else len(lines), width)
    held_out, training = divide_texts(len(lines), settings.seed)
    report(f"{len(training):,} texts to train on, {len(held_out):,} held out")
    objective: Objective
    if per_token:
        is_tagger = opened.head.task == "tag"
        classifier = {
            name: np.asarray(weight, np.float32)
            for name, weight in opened.weights.items()
            if is_tagger and name.startswith("classifier.")
        }
        objective = TokenDistillation(
            student, tokens, rows, classifier, held_out, training, settings.packs, settings.seed
        )
    else:
        objective = Distillation(student, tokens, rows, sizes, settings.packs, settings.seed)
    trainer = Trainer(student, objective, settings, folder, opened.weights, report)
    trainer.run()
    agreed = with_interval(objective.overlaps, settings.seed) if isinstance(objective, Distillation) else None
    loss = TOKEN_LOSS if per_token else LOSS
    record = TrainingRecord(
        method="distill",
        source=manifest,
        data=file.sha256,
        loss=f"{loss}; weights: {settings.train}",
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
    folder.remove("state", "best")
    shutil.rmtree(folder.path / "teacher", ignore_errors=True)
    return agreed


def teacher_outputs(teacher: Engine, tokens: Ragged, per_token: bool) -> Iterator[np.ndarray]:
    """A row for each token or for each text, part by part."""
    for part in in_parts(tokens):
        yield np.concatenate(teacher.hidden_states(part)) if per_token else teacher.embed(part)


def check_outputs(task: str | None, funnel: FunnelConfig, sizes: tuple[int, ...], per_token: bool) -> None:
    """Raises `ConfigError` if the funnel, the task or another option does not fit what is trained."""
    if per_token and funnel.output_stride > 1:
        raise ConfigError(
            f"funnel {funnel} has no row for each token, which training per token needs; add a recovery, as in "
            f"{funnel}/mean_last"
        )
    if per_token and sizes:
        raise ConfigError(f"sizes={sizes} are of sentence vectors; leave them out of training per token")
    if task == "tag" and not per_token:
        raise ConfigError(
            "this checkpoint tags tokens, but without per_token (--per-token) its sentence vectors would be trained; "
            "give it"
        )


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
