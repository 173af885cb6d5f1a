"""The results of a folder as one Markdown document, with pictures beside it where matplotlib is installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from funnel_benchmarks.charts import render
from funnel_benchmarks.report.circumstances import circumstances, wrong
from funnel_benchmarks.report.suites import SUITES
from funnel_benchmarks.results import Row, read_results
from funnel_benchmarks.suite import Section, markdown
from funnel_engine.output_files import write_bytes, write_text


def write_markdown(files: Sequence[Path], output: Path) -> str:
    """Writes `output` and, beside it, FILE.png for each plot; returns the text."""
    contents = [(file, read_results(file)) for file in files]
    text = assemble(
        [content for _, content in contents],
        [one_result(file.stem, content, output.parent) for file, content in contents],
    )
    write_text(output, text)
    return text


def assemble(contents: list[Row], results: list[str]) -> str:
    """The document: what went wrong, then each result."""
    return "\n".join(["# Measurements\n", *summary(contents), "", *results])


def one_result(name: str, content: Row, folder: Path) -> str:
    section = SUITES[content["suite"]].section(content)
    known = {fact: "; ".join(filter(None, texts)) for fact, texts in circumstances(content)}
    return markdown(section._replace(facts=section.facts | known), pictures(section, name, folder))


def pictures(section: Section, name: str, folder: Path) -> list[str]:
    """Draws the plots of a section; a line for each. An older picture of the same name does not stay."""
    lines = []
    for number, plot in enumerate(section.plots):
        file = folder / (f"{name}-{number}.png" if number else f"{name}.png")
        if importlib.util.find_spec("matplotlib"):
            write_bytes(file, render(plot, "png"))
            lines.append(f"![{plot.caption}]({file.name})")
        else:
            file.unlink(missing_ok=True)
            lines.append(f"Not drawn: {file.name} (needs matplotlib).")
    return lines


def summary(contents: list[Row]) -> list[str]:
    """The devices, and every failure."""
    devices = dict.fromkeys(", ".join(content["machine"]["devices"]) for content in contents)
    errors, left_out = (sum(len(content[field]) for content in contents) for field in ("errors", "left_out"))
    unfinished = [content["suite"] for content in contents if not content["complete"]]
    return [
        *(f"- {device}" for device in devices),
        f"- {sum(map(len, map(wrong, contents)))} wrong results, {errors} measurements failed, {left_out} left out",
        *([f"- stopped before the end of: {', '.join(unfinished)}"] if unfinished else []),
    ]
