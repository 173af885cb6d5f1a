"""The model without its funnel, for the page: it shows what the funnel changes."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from funnel_engine import Engine, FunnelConfig
from funnel_engine.pairs import Cut
from funnel_kernels.errors import FunnelError
from funnel_serving.answers import Texts
from funnel_serving.refusals import Refusal
from funnel_serving.tokenization import read_request


class Unfunneled:
    """Vectors of the same weights without a funnel. Called by the event loop; `close` by any thread.

    One call at a time runs in a thread of its own, beside the batches of the server. Programs are compiled when they
    are first needed, and do not count among those that the server's engine compiles after its warm-up.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._unfunneled: Engine | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="unfunneled")
        self._running: Future[np.ndarray] | None = None

    async def embed(self, texts: Texts, seconds: float) -> np.ndarray:
        """Vectors of length 1; what is too long is cut.

        Raises:
            Refusal: another call still runs, this one takes longer than `seconds`, or the model cannot do it.
        """
        if self._running is not None and not self._running.done():
            raise Refusal("overloaded", "another comparison is running; try again when it is done", retry_after=1.0)
        self._running = self._thread.submit(self._embed, texts)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(self._running)
        except TimeoutError:
            raise Refusal(
                "timeout", f"it took longer than {seconds:g} s, most of it to compile; try again later"
            ) from None

    def close(self, seconds: float) -> bool:
        """Whether the thread has ended within the time."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        return self._running is None or not wait([self._running], seconds).not_done

    def _embed(self, texts: Texts) -> np.ndarray:
        read = read_request(self._engine, texts, prompt_name=None, cut=Cut(self._engine.max_length, False))
        try:
            if self._unfunneled is None:
                self._unfunneled = self._engine.with_funnel(FunnelConfig())
            return self._unfunneled.embed(read.inputs)
        except FunnelError as error:
            raise Refusal("unsupported", str(error)) from error
