"""The parts of a run, in order of importance: a run that is short of time measures the first ones."""

from funnel_benchmarks.device.attention import Attention
from funnel_benchmarks.device.ceilings import Ceilings
from funnel_benchmarks.device.check import Check
from funnel_benchmarks.device.engine import WholeEngine
from funnel_benchmarks.device.flags import Flags
from funnel_benchmarks.device.funnel import Funnel
from funnel_benchmarks.device.latency import Latency
from funnel_benchmarks.device.part import Part
from funnel_benchmarks.device.peer import Peer
from funnel_benchmarks.device.ragged import Ragged
from funnel_benchmarks.device.rows import Rows

PARTS: dict[str, type[Part]] = {
    "check": Check,
    "ceilings": Ceilings,
    "attention": Attention,
    "rows": Rows,
    "engine": WholeEngine,
    "funnel": Funnel,
    "peer": Peer,
    "latency": Latency,
    "ragged": Ragged,
    "flags": Flags,
}
