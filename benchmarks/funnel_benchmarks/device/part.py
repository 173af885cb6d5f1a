"""What the suites of a run on a device share: they have a run's sizes, weights, seed and time."""

import abc
from collections.abc import Callable, Iterator
from typing import ClassVar

from funnel_benchmarks.device.bench import DTYPE, Bench
from funnel_benchmarks.device.sizes import SMALL
from funnel_benchmarks.results import Measurement, Results, Row
from funnel_benchmarks.suite import Cell, Column, Plot, Section, Suite, Table, field
from funnel_engine import FunnelConfig
from funnel_engine.served_by import served_by

CELL = Column("what", lambda row: row["cell"])
MILLISECONDS = Column("time", field("seconds", ",.3f", 1e3), "ms", "quartiles")
WITHOUT = Column("without", field("baseline_seconds", ",.3f", 1e3), "ms", "quartiles")
RATIO = Column("ratio", field("ratio", ".3f"), note="range")


class Part(Suite):
    """One part of a run.

    Attributes:
        title: of its section.
        note: how to read its figures.
        columns: of its table.
    """

    title: ClassVar[str]
    note: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    def __init__(self, bench: Bench):
        self.bench = bench

    @staticmethod
    @abc.abstractmethod
    def measurements(bench: Bench) -> Iterator[Measurement]:
        """All cells of the part."""

    def cells(self, results: Results) -> Iterator[Measurement]:
        return self.bench.clock.within(self.measurements(self.bench))

    def options(self) -> Row:
        bench = self.bench
        served = served_by(bench.sizes.config, FunnelConfig(), DTYPE, bench.target)
        return {
            "small": bench.sizes is SMALL,
            "seed": bench.seed,
            "backend": bench.backend,
            "served_by": served.facts(),
        }

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        return [Table("", cls.columns, rows)] if rows else []

    @classmethod
    def plots(cls, content: Row) -> list[Plot]:
        return []

    @classmethod
    def section(cls, content: Row) -> Section:
        options = content["options"]
        return Section(
            title=cls.title,
            summary="Sizes of a rehearsal: these figures say nothing about speed." if options["small"] else "",
            plots=cls.plots(content),
            tables=cls.tables(content["rows"]),
            reading=(cls.note,),
            facts={"Seed": str(options["seed"]), "Backend": options["backend"], **options["served_by"]},
        )


def against_goal(name: str) -> Callable[[Row], Cell | None]:
    """The cell of a figure, and below it whether it reaches the row's goal, if there is one."""

    def cell(row: Row) -> Cell | None:
        found = row.get(name)
        if found is None:
            return None
        value = found["median"] if isinstance(found, dict) else found
        goal = row.get("goal")
        below = "" if goal is None else f"goal {goal:g}: {'reached' if value >= goal else 'missed'}"
        return Cell(f"{value:.3f}", below, value)

    return cell
