"""Results of a long run, kept in a file, so that the run can be continued after it was killed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from funnel_engine.output_files import write_text
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.run_folder import check_same_run

NAME = "progress.json"


class Journal:
    """Computes each result once, in this run or in the one that it continues.

    The file is complete at any time: it is written under another name and then renamed.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], *, resume: bool):
        """
        Args:
            folder: where the file is.
            facts: all that the results depend on, as JSON values. Only a run with the same facts can be continued.
            resume: continue the run of the folder; without one, a new one begins.

        Raises:
            ConfigError: the folder has a run and `resume` is not set, or has another run.
            InputError: the file is damaged.
        """
        self.path, self.facts = folder / NAME, json.loads(json.dumps(facts))
        self.results: dict[str, Any] = {}
        if not self.path.exists():
            return
        if not resume:
            raise ConfigError(f"{folder} already has a run; continue it with --resume, or give another folder")
        try:
            content = json.loads(self.path.read_text("utf-8"))
            before, self.results = dict(content["facts"]), dict(content["results"])
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path} cannot be read ({error}); delete it and start again without --resume"
            ) from error
        check_same_run(folder, before, self.facts)

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, a JSON value, from the file if it is there."""
        if key not in self.results:
            self.results[key] = json.loads(json.dumps(compute()))
            write_text(self.path, json.dumps({"facts": self.facts, "results": self.results}))
        return self.results[key]
