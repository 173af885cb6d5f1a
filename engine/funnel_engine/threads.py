"""The number of threads that an engine's kernels use on a CPU.

The C++ kernels run on XLA's own thread pool, which has one thread for each core that the process may use, so the
kernels and XLA never compete. An engine may use fewer threads of the pool. JAX sets the size of the pool: to keep a
whole process off some cores, start it with `taskset`.
"""

import os

from funnel_engine.checks import check_integer
from funnel_kernels.errors import ConfigError

VARIABLE = "OMP_NUM_THREADS"
MOST_THREADS = 1024  # the C++ kernels have the same limit


def count_threads(asked: int | None) -> int:
    """The given number of threads, or else the value of OMP_NUM_THREADS; 0 means all.

    Raises:
        ConfigError: the number is not an integer from 1 to `MOST_THREADS`.
    """
    if asked is not None:
        return check_integer("threads", asked, least=1, most=MOST_THREADS)
    value = os.environ.get(VARIABLE, "").split(",")[0].strip()  # OpenMP allows a list, one number per nesting level
    if not value:
        return 0
    if not value.isdecimal() or not 1 <= int(value) <= MOST_THREADS:
        raise ConfigError(
            f"{VARIABLE}={os.environ[VARIABLE]!r} must be an integer from 1 to {MOST_THREADS}; correct it or unset it"
        )
    return int(value)
