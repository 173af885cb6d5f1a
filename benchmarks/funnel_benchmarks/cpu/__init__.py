"""How fast the engine is on a CPU, against what else runs there: `python -m funnel_benchmarks.cpu --json FILE`.

A peer runs in a process of its own (`funnel_benchmarks.peers`) with the same weights and token ids, and computes
only when it is asked to, so that ours and the peer's calls alternate, A B B A. Before anything is timed, both results
are compared: a peer that computes something else is no peer.
"""
