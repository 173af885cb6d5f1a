"""Which suites have a place in the report, in its order."""

from collections.abc import Callable

from funnel_benchmarks.kernels.section import section as kernels
from funnel_benchmarks.latency.section import section as latency
from funnel_benchmarks.peers.section import section as peers
from funnel_benchmarks.report.section import Section
from funnel_benchmarks.results import Row
from funnel_benchmarks.scaling.section import section as scaling
from funnel_benchmarks.serve.section import section as serve

# The `suite` of a result file -> what says in the report what such a file holds.
SECTIONS: dict[str, Callable[[Row], Section]] = {
    "latency": latency,
    "kernels": kernels,
    "peers": peers,
    "serve": serve,
    "scaling": scaling,
}
