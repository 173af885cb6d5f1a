"""Results as one HTML page that needs nothing else: no network, no further files.

A result file is not trusted: all of its text is escaped, and no script runs but the page's own, whose hash the policy
names.
"""

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterable
from html import escape
from typing import NamedTuple

from funnel_benchmarks.report.circumstances import circumstances, repeated, warning, where_and_when
from funnel_benchmarks.report.picture import picture
from funnel_benchmarks.report.style import SCRIPT, STYLE
from funnel_benchmarks.report.table import html_table
from funnel_benchmarks.results import Row
from funnel_benchmarks.suite import Section

SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'; base-uri 'none'"


class Article(NamedTuple):
    """One result on the page.

    Attributes:
        name: its identifier on the page.
        suite, title, where: what the table of contents says of it.
        html: all of it.
    """

    name: str
    suite: str
    title: str
    where: str
    html: str


def render_page(title: str, results: Iterable[tuple[Row, Section]]) -> str:
    """The whole page.

    Args:
        results: contents of result files, and what is said about each.
    """
    return assemble(title, [article(*result, f"result-{number}") for number, result in enumerate(results, start=1)])


def article(content: Row, section: Section, name: str, file: str = "") -> Article:
    """One result: findings, plots, tables, how to read them, circumstances.

    Args:
        name: an identifier that no other article of the page has.
        file: what its file is called, if the reader is to know.
    """
    where = f"{file}; {where_and_when(content)}" if file else where_and_when(content)
    pictures = [picture(plot, f"{name}-plot-{number}") for number, plot in enumerate(section.plots, start=1)]
    warned, spared = warning(content), len(repeated(content))
    parts = [
        f'<article id="{name}">',
        f"<h2>{escape(section.title)}</h2>",
        f'<p class="quiet">{escape(where)}</p>',
        *([f'<p class="warning">{escape(warned)}</p>'] if warned else []),
        *([f'<p class="quiet">Left out, as another row says the same: {spared}.</p>'] if spared else []),
        f"<p>{escape(section.summary)}</p>",
        *pictures,
        *map(html_table, section.tables),
        *(["<h3>How to read this</h3>"] if section.reading else []),
        *(f"<p>{escape(text)}</p>" for text in section.reading),
        "<h3>Circumstances</h3>",
        facts(content, section),
        "</article>",
    ]
    return Article(name, content["suite"], section.title, where, "\n".join(parts))


def facts(content: Row, section: Section) -> str:
    """The suite's own facts, then those that all results have, as a list of terms."""
    named = [*((name, [text]) for name, text in section.facts.items()), *circumstances(content)]
    terms = [
        f"<dt>{escape(name)}</dt>" + "".join(f"<dd>{escape(text)}</dd>" for text in texts if text)
        for name, texts in named
        if any(texts)
    ]
    return "<dl>\n" + "\n".join(terms) + "\n</dl>"


def assemble(title: str, articles: Iterable[Article]) -> str:
    """The page around articles; those of one suite stand together, in the order in which suites come first."""
    suites: dict[str, list[Article]] = defaultdict(list)
    for each in articles:
        suites[each.suite].append(each)
    body = "\n".join(each.html for suite in suites.values() for each in suite)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{contents(suites)}{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def contents(suites: dict[str, list[Article]]) -> str:
    """The table of contents; none for a single article."""
    if sum(map(len, suites.values())) < 2:
        return ""
    entries = "\n".join(
        f"<li>{escape(suite)}\n<ul>\n{''.join(map(entry, articles))}</ul>\n</li>" for suite, articles in suites.items()
    )
    return f'<nav aria-label="Contents">\n<ul>\n{entries}\n</ul>\n</nav>\n'


def entry(article: Article) -> str:
    return f'<li><a href="#{article.name}">{escape(article.title)}</a> <small>{escape(article.where)}</small></li>\n'
