"""The service: what every route calls. One per process, around one engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from funnel_engine import Engine
from funnel_serving.answers import Answer, Pairs, Texts, Token, TokenIds

if TYPE_CHECKING:
    from funnel_serving.settings import Settings


class Service:
    """Tokenises, waits in the queue, runs, and returns the results of one request.

    Every method may raise `Refusal`. A route lets it rise: `app.py` counts it, writes it to the log, and asks
    `wire.refusal_response(path, refusal)` for the reply. Times and token counts go into the headers of the reply in
    `app.py` too. When a client leaves, its route is cancelled, and with it what waits in the queue.

    Attributes:
        settings: those of the server.
        engine: the engine; it raises a `Refusal` ("unhealthy") as long as the model is not loaded.
    """

    settings: "Settings"
    engine: Engine

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
        raise NotImplementedError

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
        raise NotImplementedError

    async def classify(
        self,
        inputs: Texts | TokenIds | Pairs,
        *,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        truncate_left: bool = False,
    ) -> Answer:
        """Raw logits of each input, [B, labels]. A pair of texts is a tuple of two strings."""
        raise NotImplementedError

    async def tag(
        self,
        inputs: Texts | TokenIds,
        *,
        truncate: bool | None = None,
        max_tokens: int | None = None,
        truncate_left: bool = False,
    ) -> Answer:
        """Raw logits of each token: a list of [T, labels] arrays, and `Answer.tokens` if the inputs are texts."""
        raise NotImplementedError

    async def tokenize(
        self, inputs: Texts, *, add_special_tokens: bool = True, prompt_name: str | None = None
    ) -> list[list[Token]]:
        """The tokens of each text, as the engine would run them."""
        raise NotImplementedError

    async def decode(self, ids: TokenIds, *, skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of token ids."""
        raise NotImplementedError

    @property
    def labels(self) -> Sequence[str]:
        """The names of the classes, in the order of the logits."""
        return self.engine.head.labels
