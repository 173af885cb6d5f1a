"""The dashboard for Grafana asks for metrics and labels that the server really has."""

import itertools
import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from funnel_serving.metrics import Metrics

FILE = Path(__file__).parents[2] / "serving" / "deploy" / "grafana.json"
DASHBOARD = json.loads(FILE.read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
OF_PROMETHEUS = {"instance", "job"}  # labels that it adds to each metric that it reads
CALLS = {"rate", "sum", "by", "histogram_quantile", "label_values"}

# Each metric by name, with the labels of its series.
SERIES = {
    sample.name: set(sample.labels)
    for family in text_string_to_metric_families(Metrics().text().decode())
    for sample in family.samples
}
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]] + [
    variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"
]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-zA-Z_]\w*", text))


def unknown(query: str) -> set[str]:
    """The names of a query that are neither metrics of the server, nor labels of the metrics in the query."""
    plain = re.sub(r'"[^"]*"|\[[^]]*\]', "", query)
    metrics = words(plain) & SERIES.keys()
    assert metrics, query
    labels = OF_PROMETHEUS.union(*(SERIES[name] for name in metrics))
    return words(plain) - CALLS - metrics - labels


@pytest.mark.parametrize("query", QUERIES)
def test_every_metric_and_label_exists(query):
    assert unknown(query) == set()


def test_a_wrong_name_is_noticed():
    assert unknown("sum by (method) (rate(funnel_requests_total[1m]))") == set()
    assert unknown("funnel_waiting_rows + funnel_requests") == {"funnel_requests"}
    assert unknown('sum by (kind) (funnel_requests_total{status="4xx"})') == {"kind", "status"}


def test_what_is_shown():
    shown = set().union(*(words(query) for query in QUERIES)) & SERIES.keys()
    assert shown >= {
        *(f"funnel_{name}_total" for name in ("requests", "failures", "tokens", "padding_rows")),
        *(f"funnel_{name}_seconds_bucket" for name in ("request", "tokenization", "queue", "inference")),
        *("funnel_waiting_rows", "funnel_batch_sequences_bucket", "funnel_batch_rows_bucket"),
        "funnel_compilations_after_warmup_total",
    }


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    for first, second in itertools.combinations([panel["gridPos"] for panel in PANELS], 2):
        apart = [
            one[place] + one[size] <= other[place]
            for place, size in (("x", "w"), ("y", "h"))
            for one, other in ((first, second), (second, first))
        ]
        assert any(apart), (first, second)
    assert all(0 <= panel["gridPos"]["x"] <= 24 - panel["gridPos"]["w"] for panel in PANELS)
