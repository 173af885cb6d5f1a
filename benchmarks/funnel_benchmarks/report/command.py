"""The command `funnel bench report`."""

import json
from pathlib import Path

import click

from funnel_benchmarks.report.page import Article, article, assemble
from funnel_benchmarks.report.suites import SUITES
from funnel_benchmarks.results import error_text, read_results
from funnel_benchmarks.suite_command import FILE, check_files
from funnel_engine.output_files import write_text
from funnel_kernels.errors import FunnelError, InputError

REPORT = "report.html"


@click.command()
@click.argument("folder", metavar="DIR", type=FILE)
@click.option("--output", type=FILE, metavar="FILE", help=f"Where the page goes. Default: DIR/{REPORT}.")
def report(folder: Path, output: Path | None) -> None:
    """Show all results of a folder on one HTML page, which opens in any browser and needs no network.

    Takes every *.json file of DIR. One that is no whole result is named, and the others are shown all the same. Exit
    status 1: there was such a file.

    Example: funnel bench report results --output results.html
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory; name the folder that has the result files")
    output = output or folder / REPORT
    check_files(html=output)
    files = sorted(folder.glob("*.json"))
    articles: list[Article] = []
    for number, file in enumerate(files, start=1):
        try:
            articles.append(article_of(file, f"result-{number}"))
        except FunnelError as error:
            click.echo(f"left out: {error}", err=True)
    if not articles:
        raise InputError(f"{folder} has no result that can be shown, in {len(files)} files *.json; see `funnel bench`")
    places = list(SUITES)
    articles.sort(key=lambda each: places.index(each.suite))
    write_text(output, assemble("Measurements", articles))
    click.echo(f"{output}: {len(articles)} of {len(files)} results")
    if len(articles) < len(files):
        raise SystemExit(1)


def article_of(file: Path, name: str) -> Article:
    """What the page says of one result file.

    Raises:
        InputError: it is no result file, is of a suite without a place in the report, or lacks what its suite writes.
    """
    content = read_results(file)
    suite = content["suite"]
    if suite not in SUITES:
        raise InputError(f"{file} is of suite {suite!r}, which has no place here; those are: {', '.join(SUITES)}")
    try:
        json.dumps([file.name, content], ensure_ascii=False).encode()  # fails for half a character, which JSON allows
        return article(content, SUITES[suite].section(content), name, file.name)
    except Exception as error:  # whatever comes of a field that is missing or of another type
        raise InputError(
            f"{file} does not hold what suite {suite!r} writes ({error_text(error)}); measure again, into another file"
        ) from error
