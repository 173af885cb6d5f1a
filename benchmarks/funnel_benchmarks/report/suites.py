"""The suites that write result files, in the order of the report."""

from funnel_benchmarks.device.profile import Suite as Profile
from funnel_benchmarks.kernels.check import Check
from funnel_benchmarks.kernels.suite import Suite as Kernels
from funnel_benchmarks.latency.suite import Suite as Latency
from funnel_benchmarks.peers.suite import Suite as Peers
from funnel_benchmarks.scaling.suite import Suite as Scaling
from funnel_benchmarks.serve.http_suite import Suite as ServeHttp
from funnel_benchmarks.serve.suite import Suite as Serve
from funnel_benchmarks.suite import Suite

ALL: tuple[type[Suite], ...] = (Latency, Kernels, Peers, Serve, ServeHttp, Scaling, Check, Profile)
SUITES = {suite.name: suite for suite in ALL}  # by the `suite` of a result file
