"""How far a run has got, and the time that it has left, at the bottom of a terminal."""

from types import TracebackType

from rich import progress
from rich.console import Console

A_DAY = 24 * 3600.0


class Progress:
    """A bar for `cells` cells of `steps` steps each, shown from `with` to the end of its block."""

    def __init__(self, console: Console, suite: str, cells: int, steps: int):
        self.steps, self.begun = steps, 0
        # The time left is estimated from all of the run, since a single step may take minutes.
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.TextColumn("{task.percentage:.0f} %, time left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[cell]}"),
            console=console,
            transient=True,
            speed_estimate_period=A_DAY,
        )
        self.task = self.bar.add_task(suite, total=cells * steps, cell="")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def begin(self, cell: str) -> None:
        """Another cell begins; those before it are done, however many steps they have told of."""
        self.bar.update(self.task, completed=self.begun * self.steps, cell=cell)
        self.begun += 1

    def step(self) -> None:
        """A step of the cell is done."""
        self.bar.advance(self.task)
