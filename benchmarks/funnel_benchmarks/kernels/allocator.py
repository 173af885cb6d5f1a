"""How the C library hands out memory while kernels are timed."""

import ctypes

# Parameters of mallopt in glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, from now to its end; only glibc knows how.

    A kernel inside a model's program writes into memory that the program has used before. A kernel that is a program of
    its own gets its result from the operating system anew in each call, page by page, and that takes longer than most
    row-wise ops. With this the next call's result is the last one's memory.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1)):
            library.mallopt(parameter, value)
