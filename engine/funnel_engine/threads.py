"""How many threads an engine's kernels use on a CPU.

The kernels in C++ run on XLA's own pool of threads, one for each core that the process may use, so that the two never
compete. An engine may use fewer of them. The pool itself is made by JAX and as large as the machine allows: to keep a
whole process off some cores, start it with `taskset`.
"""

import os

from funnel_engine.config import check_integer
from funnel_kernels.errors import ConfigError

VARIABLE = "OMP_NUM_THREADS"
MOST_THREADS = 1024  # of the kernels in C++, too


def count_threads(asked: int | None) -> int:
    """The number of threads that is asked for, or that OMP_NUM_THREADS says; 0 stands for all.

    Raises:
        ConfigError: either is not an integer from 1 to `MOST_THREADS`.
    """
    if asked is not None:
        return check_integer("threads", asked, least=1, most=MOST_THREADS)
    value = os.environ.get(VARIABLE, "").split(",")[0].strip()  # OpenMP allows a list, one for each level of nesting
    if not value:
        return 0
    if not value.isdecimal() or not 1 <= int(value) <= MOST_THREADS:
        raise ConfigError(
            f"{VARIABLE}={os.environ[VARIABLE]!r} must be an integer from 1 to {MOST_THREADS}; correct it or unset it"
        )
    return int(value)
