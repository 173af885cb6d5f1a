"""How the page looks, and the script that sorts its tables."""

from funnel_benchmarks.charts import DARK, LIGHT, Look


def colours(look: Look) -> dict[str, str]:
    """The colours of a look by their names, which are also those of the page's CSS variables."""
    return {name: value for name, value in look._asdict().items() if isinstance(value, str)}


def declared(look: Look) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours(look).items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; --quiet: #5c6370; {declared(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --quiet: #a3aab8; {declared(DARK)} }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 0 0 0.5rem; }
h3 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
p, dl { max-width: 60rem; }
a { color: var(--measured); }
nav ul { margin: 0 0 1rem; padding-left: 1.25rem; }
article { border-top: 1px solid var(--grid); margin-top: 2rem; padding-top: 1.5rem; }
.quiet, figcaption, small { color: var(--quiet); }
.quiet { margin: 0 0 0.75rem; }
.warning { border-left: 0.25rem solid var(--ideal); padding-left: 0.75rem; }
figure { margin: 1.5rem 0 0; }
figcaption { font-size: 0.9rem; margin: 0.25rem 0; }
svg { display: block; width: 100%; max-width: 50rem; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg.narrow { display: none; }
@media (max-width: 40rem) { svg.wide { display: none; } svg.narrow { display: block; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; }
td { vertical-align: top; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); text-align: left;
  white-space: normal; min-width: 10rem; max-width: 18rem; }
small { display: block; font-weight: normal; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--measured); }
th span::after { content: " \\2195"; color: var(--quiet); font-weight: normal; }
th[aria-sort=ascending] span::after { content: " \\2191"; color: var(--ink); }
th[aria-sort=descending] span::after { content: " \\2193"; color: var(--ink); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; grid-column: 2; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { grid-column: 1; margin-bottom: 0.5rem; }
  th:first-child, td:first-child { min-width: 7rem; max-width: 9rem; }
}
"""
)

# Rows without a value stay at the end, whichever way the others are sorted.
SCRIPT = """
"use strict";

function compare(first, second, sign) {
  const [here, there] = [first.dataset.value, second.dataset.value];
  if (here !== undefined && there !== undefined) return sign * (here - there);
  if (here === there) return sign * first.textContent.localeCompare(second.textContent, "en", { numeric: true });
  return here === undefined ? 1 : -1;
}

function sortBy(heading) {
  const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const body = heading.closest("table").tBodies[0], column = heading.cellIndex;
  body.append(...[...body.rows].sort((first, second) => compare(first.cells[column], second.cells[column], sign)));
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
"""
