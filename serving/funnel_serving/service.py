"""The service: what every route calls. One per process, around one engine."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from funnel_engine import ConfigError, Engine, FunnelConfig
from funnel_engine.pairs import Cut
from funnel_engine.results import finish_vectors
from funnel_serving.answers import Answer, Inputs, Pairs, Texts, Timing, Token, TokenIds
from funnel_serving.batcher import Batcher
from funnel_serving.health import Health
from funnel_serving.metrics import Metrics
from funnel_serving.refusals import Refusal
from funnel_serving.settings import Settings
from funnel_serving.tokenization import decode, describe_tokens, read_request
from funnel_serving.unfunneled import Unfunneled

INLINE_SIZE = 4096  # characters or ids: fewer take less time to tokenise than to hand over to a thread
TOKENIZERS = 2  # threads for what is longer
LOADING_SECONDS = 5.0  # after which a client may ask again while the model is loaded

Result = TypeVar("Result")


class Service:
    """Tokenises, waits in the queue, runs, and returns the results of one request.

    Every method may raise `Refusal`. A route lets it rise: `app.py` counts it, writes it to the log, and asks
    `wire.refusal_response(path, refusal)` for the reply. When a client leaves, its route is cancelled, and with it what
    waits in the queue.

    Attributes:
        settings: those of the server.
        metrics: what Prometheus reads.
        health: whether the model is loaded, and whether the server stops.
        batcher: the queue before the engine; None as long as the model is not loaded.
        no_comparison: why `embed_without_funnel` does nothing; empty if it works.
    """

    def __init__(self, settings: Settings, metrics: Metrics, health: Health):
        self.settings, self.metrics, self.health = settings, metrics, health
        self.batcher: Batcher | None = None
        self.no_comparison = "the model is not loaded yet"
        self._unfunneled: Unfunneled | None = None
        self._tokenizers = ThreadPoolExecutor(TOKENIZERS, thread_name_prefix="tokenizer")

    def attach(self, engine: Engine) -> None:
        """Makes the service ready, with an engine that is warm."""
        self.metrics.engine.stats = engine.stats
        if engine.funnel == FunnelConfig():
            self.no_comparison = "There is nothing to compare: this server runs without a funnel."
        elif not self.settings.compare_funnel:
            self.no_comparison = "The comparison is off: the server runs with --no-compare-funnel."
        else:
            self.no_comparison, self._unfunneled = "", Unfunneled(engine)
        self.batcher = Batcher(
            engine,
            self.metrics,
            max_waiting_rows=self.settings.max_waiting_rows,
            max_waiting_requests=self.settings.max_waiting_requests,
        )
        if self.health.state != "stopping":
            self.health.state = "ready"

    def close(self, seconds: float) -> bool:
        """Ends all threads, once the work that was accepted is done; whether that was within the time."""
        self._tokenizers.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + seconds
        is_done = self.batcher is None or self.batcher.close(seconds)
        return (self._unfunneled is None or self._unfunneled.close(max(0.0, end - time.monotonic()))) and is_done

    @property
    def engine(self) -> Engine:
        return self._ready().engine

    @property
    def labels(self) -> Sequence[str]:
        """The names of the classes, in the order of the logits."""
        return self.engine.head.labels

    @property
    def is_live(self) -> bool:
        """Whether batches end, if there is work."""
        return self.batcher is None or self.batcher.seconds_without_progress() < self.settings.stall_seconds

    async def embed(
        self,
        inputs: Texts | TokenIds,
        *,
        normalize: bool = True,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        truncate_left: bool = False,
    ) -> Answer:
        """One vector per input.

        Args:
            inputs: a list of texts, or of lists of token ids.
            normalize, dimensions, prompt_name: as `normalize`, `truncate_dim` and `prompt_name` of `Engine.embed`.
            truncate: cut inputs that are longer than the limit, instead of refusing them; None is the server's setting.
            max_tokens: a limit below that of the engine; with it, longer inputs are cut whatever `truncate` says.
            truncate_left: cut off the beginning, and not the end.
        """
        size = self.engine.embedding_size
        if dimensions is not None and not 1 <= dimensions <= size:
            raise Refusal.invalid(f"dimensions is {dimensions}; it must be from 1 to {size}", param="dimensions")
        cut = self._cut(truncate, max_tokens, truncate_left)
        answer = await self._answer("embed", inputs, prompt_name=prompt_name, cut=cut)
        finish = partial(finish_vectors, answer.results, dimensions or size, normalize)
        vectors = await self._in_thread_if_large(answer.results.size // 64, finish)
        return Answer(vectors, answer.token_counts, answer.truncated, answer.timing)

    async def embed_without_funnel(self, texts: Texts) -> np.ndarray:
        """One vector of length 1 per text, of the same weights without a funnel; too long texts are cut."""
        self._ready()
        if self._unfunneled is None:
            raise Refusal("unsupported", self.no_comparison)
        return await self._unfunneled.embed(texts, self.settings.request_seconds)

    async def rows(
        self,
        inputs: Texts | TokenIds,
        *,
        prompt_name: str | None = None,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        truncate_left: bool = False,
    ) -> Answer:
        """The encoder's rows of each input, not pooled: a list of [R, D] arrays."""
        cut = self._cut(truncate, max_tokens, truncate_left)
        return await self._answer("hidden_states", inputs, prompt_name=prompt_name, cut=cut)

    async def classify(
        self,
        inputs: Texts | TokenIds | Pairs,
        *,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        truncate_left: bool = False,
    ) -> Answer:
        """Raw logits of each input, [B, labels]. A pair of texts is a tuple of two strings."""
        return await self._answer("classify", inputs, cut=self._cut(truncate, max_tokens, truncate_left))

    async def tag(
        self,
        inputs: Texts | TokenIds,
        *,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        truncate_left: bool = False,
    ) -> Answer:
        """Raw logits of each token: a list of [T, labels] arrays, and `Answer.tokens` if the inputs are texts."""
        return await self._answer("tag", inputs, cut=self._cut(truncate, max_tokens, truncate_left))

    async def tokenize(
        self, inputs: Texts, *, add_special_tokens: bool = True, prompt_name: str | None = None
    ) -> list[list[Token]]:
        """The tokens of each text, as the engine would run them."""
        describe = partial(
            describe_tokens, self.engine, inputs, add_special_tokens=add_special_tokens, prompt_name=prompt_name
        )
        return await self._in_thread_if_large(size_of(inputs), describe)

    async def decode(self, ids: TokenIds, *, skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of token ids."""
        run = partial(decode, self.engine, ids, skip_special_tokens=skip_special_tokens)
        return await self._in_thread_if_large(size_of(ids), run)

    def _ready(self) -> Batcher:
        if self.batcher is None:
            raise Refusal(
                "unhealthy", f"the server is {self.health.state}; try again later", retry_after=LOADING_SECONDS
            )
        return self.batcher

    def _cut(self, truncate: bool | None, max_tokens: int | None, from_left: bool) -> Cut | None:
        limit = self.engine.max_length
        if max_tokens is not None:
            return Cut(min(limit, max_tokens), from_left)
        return Cut(limit, from_left) if (self.settings.truncate if truncate is None else truncate) else None

    async def _answer(self, method: str, inputs: Inputs, *, prompt_name: str | None = None, cut: Cut | None) -> Answer:
        """Runs a method of the engine on inputs; vectors are neither cut nor normalised yet."""
        began = time.perf_counter()
        batcher = self._ready()
        engine, seconds = batcher.engine, self.settings.request_seconds
        self.metrics.observe_request(method, len(inputs))
        try:
            engine.check_method(method)
        except ConfigError as error:
            raise Refusal("unsupported", str(error)) from error
        batcher.check_room(len(inputs))
        try:
            async with asyncio.timeout(seconds):
                read = partial(read_request, engine, inputs, prompt_name=prompt_name, cut=cut)
                tokenized = await self._in_thread_if_large(size_of(inputs), read)
                submitted = time.perf_counter()
                request = batcher.submit(method, tokenized.inputs, began + seconds)
                try:
                    results = await request.future
                finally:
                    if request.taken < len(request.rows):
                        batcher.drop(request)
        except TimeoutError:
            raise Refusal(
                "timeout", f"the request took longer than the limit of {seconds:g} s; send fewer inputs in a request"
            ) from None
        counts = tokenized.inputs.lengths.tolist()
        timing = Timing(submitted - began, request.began - request.submitted, request.ended - request.began)
        self.metrics.observe_answer(method, counts, tokenized.truncated, timing)
        tokens: list[list[Token]] = []
        if method == "tag" and (texts := [text for text in inputs if isinstance(text, str)]):
            tokens = [
                each if kept is None else [each[index] for index in kept]
                for each, kept in zip(await self.tokenize(texts), tokenized.kept, strict=True)
            ]
        return Answer(results, counts, tokenized.truncated, timing, tokens)

    async def _in_thread_if_large(self, size: int, function: Callable[[], Result]) -> Result:
        """Runs a function here if it takes a moment, and else in a thread, so that other requests go on."""
        if size <= INLINE_SIZE:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, function)


def size_of(inputs: Sequence[Any]) -> int:
    """About how many characters or ids these are."""
    return sum(sum(map(len, item)) if isinstance(item, tuple) else len(item) for item in inputs)
