"""What a training run keeps on the disk, so that it can be killed at any moment and continued."""

import dataclasses
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from funnel_engine.checkpoints.native import synchronize
from funnel_engine.output_files import write_text
from funnel_kernels.errors import ConfigError, InputError

Tree = Any  # a pytree of arrays


def check_same_run(folder: Path, before: Any, now: dict[str, Any]) -> None:
    """Raises `ConfigError` unless a folder has the run that is to be continued.

    Args:
        before, now: all that the results depend on, as JSON values.
    """
    earlier = before if isinstance(before, dict) else {}
    changed = [name for name in now if earlier.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"the run in {folder} had another {' and '.join(changed)}: {name} was {earlier.get(name)!r:.200}, now "
            f"it is {now[name]!r:.200}; give what it had, or another folder"
        )


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A folder with run.json (what the run is), log.jsonl, and the state of the run. Every file is always complete."""

    path: Path

    def open(self, run: dict[str, Any], *, resume: bool) -> None:
        """Makes the folder, or continues in it.

        Raises:
            ConfigError: it exists although `resume` is not set, does not exist although it is, or has another run.
            InputError: it cannot be written.
        """
        file, run = self.path / "run.json", json.loads(json.dumps(run))
        if not resume:
            if self.path.exists():
                raise ConfigError(
                    f"{self.path} exists: a run was there before; continue it (--resume), remove it, or choose another "
                    "output"
                )
            partial = self.path.with_name(f".{self.path.name}-{os.getpid()}.partial")  # the folder has its file at once
            try:
                partial.mkdir()
                write_text(partial / file.name, json.dumps(run, indent=2) + "\n")
                partial.rename(self.path)
            except OSError as error:
                raise InputError(f"cannot make {self.path}: {error.strerror}; choose another output") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.path} does not have a run to resume; remove it if it exists, and leave --resume out"
            ) from error
        check_same_run(self.path, earlier, run)

    def write_arrays(self, name: str, tree: Tree) -> None:
        """Writes the arrays of a tree to NAME.npz.

        Raises:
            InputError: they cannot be written, e.g. because the disk is full; an earlier file stays.
        """
        partial = self.path / f".{name}.partial"
        try:
            with partial.open("wb") as file:
                np.savez(file, *map(np.asarray, jax.tree.leaves(tree)))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / f"{name}.npz")
            synchronize(self.path)
        except OSError as error:
            raise self.not_written(f"{name}.npz", error) from error
        finally:
            partial.unlink(missing_ok=True)

    def not_written(self, name: str, error: OSError) -> InputError:
        return InputError(
            f"cannot write {self.path / name}: {error.strerror or error}; the state before it is kept. Free some space "
            "and continue with --resume"
        )

    def has_arrays(self, name: str) -> bool:
        return (self.path / f"{name}.npz").exists()

    def read_arrays(self, name: str, tree: Tree) -> Tree:
        """The arrays that were written as NAME, in the shape of `tree`.

        Raises:
            InputError: the file is damaged.
        """
        file = self.path / f"{name}.npz"
        try:
            with np.load(file) as arrays:
                leaves = [arrays[f"arr_{index}"] for index in range(len(arrays.files))]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{file} cannot be read ({error}); remove {self.path} and begin again") from error

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / f"{name}.npz").unlink(missing_ok=True)

    def log(self, entry: dict[str, Any]) -> None:
        """Appends a line to log.jsonl.

        Raises:
            InputError: it cannot be written, e.g. because the disk is full.
        """
        try:
            with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise self.not_written("log.jsonl", error) from error

    def entries(self, last_step: int) -> list[dict[str, Any]]:
        """The lines of the log up to a step; those after it are removed, because the run continues there."""
        file = self.path / "log.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        kept = [entry for entry in whole if entry["step"] <= last_step]
        write_text(file, "".join(json.dumps(entry) + "\n" for entry in kept))
        return kept
