"""The command `funnel bench report`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from funnel_benchmarks.charts import require_matplotlib
from funnel_benchmarks.report import markdown
from funnel_benchmarks.report.page import article, assemble
from funnel_benchmarks.report.suites import SUITES
from funnel_benchmarks.results import Row, error_text, read_results
from funnel_benchmarks.suite_command import FILE
from funnel_engine.output_files import check_writable, write_text
from funnel_kernels.errors import FunnelError, InputError

REPORT = "report.html"


@click.command()
@click.argument("folder", metavar="DIR", type=FILE)
@click.option(
    "--output",
    type=FILE,
    metavar="FILE",
    help=f"Where the page goes: FILE.html, or FILE.md with pictures beside it. Default: DIR/{REPORT}.",
)
def report(folder: Path, output: Path | None) -> None:
    """Show all results of a folder on one HTML page, which opens in any browser and needs no network; or in Markdown.

    Takes every *.json file of DIR. A file that is not a whole result is named, and the others are shown all the same.
    Exit status 1: there was such a file.

    Example: funnel bench report results --output results.html
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory; name the folder that has the result files")
    output = output or folder / REPORT
    check_writable(output, (".html", ".md"))
    as_markdown = output.suffix == ".md"
    if not as_markdown:
        require_matplotlib()
    files = sorted(folder.glob("*.json"))
    results: list[tuple[Row, Any]] = []
    for number, file in enumerate(files, start=1):

        def make(content: Row, file: Path = file, name: str = f"result-{number}") -> Any:
            if as_markdown:
                return markdown.one_result(file.stem, content, output.parent)
            return article(content, SUITES[content["suite"]].section(content), name, file.name)

        try:
            results.append(shown(file, make))
        except FunnelError as error:
            click.echo(f"left out: {error}", err=True)
    if not results:
        raise InputError(f"{folder} has no result that can be shown, in {len(files)} files *.json; see `funnel bench`")
    places = list(SUITES)
    results.sort(key=lambda result: places.index(result[0]["suite"]))
    made = [each for _, each in results]
    if as_markdown:
        write_text(output, markdown.assemble([content for content, _ in results], made))
    else:
        write_text(output, assemble("Measurements", made))
    click.echo(f"{output}: {len(results)} of {len(files)} results")
    if len(results) < len(files):
        raise SystemExit(1)


def shown(file: Path, make: Callable[[Row], Any]) -> tuple[Row, Any]:
    """The content of a result file, and what is made of it.

    Raises:
        InputError: it is not a result file, is of a suite without a place in the report, or lacks what its suite
            writes.
    """
    content = read_results(file)
    suite = content["suite"]
    if suite not in SUITES:
        raise InputError(f"{file} is of suite {suite!r}, which the report does not know; it knows {', '.join(SUITES)}")
    try:
        json.dumps([file.name, content], ensure_ascii=False).encode()  # fails for half a character, which JSON allows
        return content, make(content)
    except Exception as error:  # whatever comes of a field that is missing or of another type
        raise InputError(
            f"{file} does not contain what suite {suite!r} writes ({error_text(error)}); measure again, into another "
            "file"
        ) from error
