"""What every adapter wraps: a checkpoint that embeds queries and documents, each with a prompt of its own."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from funnel_kernels.errors import ConfigError
from funnel_serving.engines import shared_engine

QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the names that sentence-transformers looks for, in this order
BLANK = " "  # is embedded where a benchmark has an empty text: the engine refuses one


class Embedder:
    """Embeds texts with an engine of this process. Vectors have length 1.

    Args:
        checkpoint: a folder that `convert` wrote.
        funnel: the short form, e.g. "6:2/mean" or "none"; None takes the checkpoint's own.
        truncate: cut the end off texts that are too long, instead of refusing them.
        truncate_dim: keep only the first dimensions of a vector (Matryoshka).
        options: further arguments of `Engine.load`.
    """

    def __init__(
        self,
        checkpoint: str | PathLike[str],
        *,
        funnel: str | None = None,
        truncate: bool = False,
        truncate_dim: int | None = None,
        **options: Any,
    ):
        self.engine = shared_engine(checkpoint, funnel=funnel, **options)
        self.truncate, self.truncate_dim = truncate, truncate_dim
        prompts = self.engine.text.prompts
        self.query_prompt = next((name for name in QUERY_PROMPTS if name in prompts), None)
        self.document_prompt = next((name for name in DOCUMENT_PROMPTS if name in prompts), None)

    def embed(
        self, texts: Sequence[str], prompt_name: str | None = None, truncate_dim: int | None = None
    ) -> np.ndarray:
        """[texts, dimensions] float32; without a name of a prompt, with the checkpoint's default prompt.

        Raises:
            InputError: a text is empty or too long, or the prompt is unknown.
        """
        width = self.truncate_dim if truncate_dim is None else truncate_dim
        if not texts:
            return np.empty((0, width or self.engine.embedding_size), np.float32)
        return self.engine.embed(texts, prompt_name=prompt_name, truncate=self.truncate, truncate_dim=width)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """As `embed`, with the prompt for queries if the checkpoint has one."""
        return self.embed(texts, self.query_prompt)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """As `embed`, with the prompt for documents if the checkpoint has one."""
        return self.embed(texts, self.document_prompt)


def fill_empty(texts: Sequence[str]) -> list[str]:
    """The texts, with `BLANK` for those that are empty."""
    return [text or BLANK for text in texts]


def not_installed(package: str, error: ModuleNotFoundError) -> ConfigError:
    """The error for a framework that cannot be imported."""
    return ConfigError(f"{package} cannot be imported ({error}); run: pip install {package}")
