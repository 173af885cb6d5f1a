"""What every command that trains a checkpoint does before its training and after it."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from funnel_engine import Engine
from funnel_engine.checkpoints.convert import prepare_destination, save
from funnel_engine.checkpoints.native import MANIFEST, Checkpoint, read_source
from funnel_engine.checkpoints.source import Agreement, TrainingRecord
from funnel_engine.checkpoints.tensors import ArrayTensor
from funnel_engine.config import Funnel
from funnel_engine.heads import Head
from funnel_engine.input_files import hash_file, to_path
from funnel_engine.text import read_tokenizer
from funnel_training.engines import check_trainable, funnel_to_train, read_checkpoint_as
from funnel_training.package_versions import package_versions
from funnel_training.run_folder import RunFolder
from funnel_training.scores import Ints
from funnel_training.student import Student
from funnel_training.trainer import Objective, Report, Settings, Trainer, data_mesh

HELD_OUT_PART, MOST_HELD_OUT = 10, 1000  # a tenth of the data, at most 1000 units, is held out of training
LEAST_UNITS = 200


class TrainingRun:
    """The training of a copy of a checkpoint for a funnel, from opening the checkpoint to writing the copy.

    The state of the run, its log (log.jsonl) and a plot are in the folder OUTPUT.training, which stays.

    Attributes:
        source: the folder of the checkpoint.
        opened: the checkpoint, with the attention, head and weights that training begins with.
        funnel: the funnel to train for.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        output: str | os.PathLike[str],
        settings: Settings,
        report: Report,
        *,
        funnel: Funnel | None,
        attention: str | None,
        pooling: str | None = None,
    ):
        """Opens the checkpoint; nothing is written before `open`.

        Args:
            funnel: None takes the checkpoint's own.
            attention, pooling: as in `Engine.load`; the copy keeps them.

        Raises:
            CheckpointError: the checkpoint cannot be read, or the output cannot be written.
            ConfigError: an option does not fit the checkpoint.
        """
        self.source, self.settings, self.report = to_path(checkpoint), settings, report
        self.destination = prepare_destination(to_path(output), self.source, False)
        self.opened: Checkpoint = read_checkpoint_as(self.source, attention=attention, pooling=pooling)
        check_trainable(self.source, self.opened)
        self.funnel = funnel_to_train(self.opened, funnel)
        self.manifest = hash_file(self.source / MANIFEST)
        self.folder = RunFolder(self.destination.with_name(f"{self.destination.name}.training"))

    def student(self, head: Head) -> Student:
        return Student(
            self.opened.config,
            head,
            self.funnel,
            self.settings.train,
            self.settings.rows,
            self.settings.texts,
            self.settings.dtype,
            data_mesh(self.settings.packs),
            self.settings.recompute,
        )

    def engine(self, student: Student, dtype: str | None) -> Engine:
        """The model as it is before its training, without a funnel; it takes the texts that the student can."""
        return Engine(
            self.opened.config,
            self.opened.head,
            self.opened.weights,
            tokenizer=read_tokenizer(self.opened.tokenizer_file) if self.opened.tokenizer_file else None,
            text=self.opened.manifest.text,
            max_batch_tokens=student.plan.longest(student.rows),
            dtype=dtype,
        )

    def open(self, facts: dict[str, Any], *, resume: bool) -> None:
        """Makes the folder of the run, or continues in it.

        Args:
            facts: what else the results depend on, as JSON values by name.

        Raises:
            ConfigError: the folder has another run, or it exists although `resume` is not set.
            InputError: it cannot be written.
        """
        run = {
            "checkpoint": self.manifest,
            "funnel": str(self.funnel),
            "attention": self.opened.config.attention,
            "pooling": self.opened.head.pooling,
            "settings": dataclasses.asdict(self.settings),
            "versions": package_versions("optax"),
            "devices": [device.device_kind for device in jax.devices()],
        }
        self.folder.open(run | facts, resume=resume)

    def trainer(self, student: Student, objective: Objective) -> Trainer:
        return Trainer(student, objective, self.settings, self.folder, self.opened.weights, self.report)

    def write(
        self,
        trainer: Trainer,
        figures: dict[str, float],
        *,
        method: str,
        data: str,
        loss: str,
        agreement: Agreement | None = None,
    ) -> None:
        """Writes the copy with its best weights and a record of their training.

        The arguments are those of `TrainingRecord`; `figures` are those on held-out data.

        Raises:
            CheckpointError: a weight is not finite, or the disk is full.
        """
        record = TrainingRecord(
            method=method,
            source=self.manifest,
            data=data,
            loss=f"{loss}; weights: {self.settings.train}",
            steps=trainer.best_step,
            agreement=agreement,
            held_out=figures,
            versions=package_versions("optax"),
        )
        trained = {
            name: ArrayTensor.of(name, np.asarray(array), self.source) for name, array in trainer.best_weights().items()
        }
        model = read_source(self.source)
        model = dataclasses.replace(
            model,
            config=self.opened.config,
            head=self.opened.head,
            weights={**model.weights, **trained},
            funnel=self.funnel,
            training=record,
        )
        save(model, self.destination, self.opened.dtype)
        self.folder.remove("state", "best")


def hold_out(order: Ints) -> tuple[Ints, Ints]:
    """The units that are held out of training, the first ones in this order, and the others; indices, ascending."""
    held_out = min(len(order) // HELD_OUT_PART, MOST_HELD_OUT)
    order = order.astype(np.int32)
    return np.sort(order[:held_out]), np.sort(order[held_out:])
