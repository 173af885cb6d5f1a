"""An encoder for the evaluators and functions of sentence-transformers, which ask only for some of a model's methods.

encoder = FunnelEncoder("my-gemma")
EmbeddingSimilarityEvaluator(sentences1, sentences2, scores)(encoder)
"""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from funnel_kernels.errors import InputError
from funnel_serving.adapters.embedder import Embedder, fill_empty, not_installed

try:
    import torch
    from sentence_transformers.util import cos_sim, pairwise_cos_sim, quantize_embeddings
except ModuleNotFoundError as error:
    raise not_installed("sentence-transformers", error) from error


class NoModelCard:
    """Takes the scores that an evaluator has for the model's card, after which it also returns them."""

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Does nothing: an encoder is not saved, so it has no card."""


class FunnelEncoder:
    """Encodes as a `SentenceTransformer` does; the arguments are those of `Embedder`.

    Vectors always have length 1, whether `normalize_embeddings` asks for it or not. The engine makes its own batches,
    so `batch_size` changes nothing. Texts that are too long are cut, as the library does it, unless `truncate=False`.
    """

    model_card_data = NoModelCard()
    similarity_fn_name = "cosine"
    similarity = staticmethod(cos_sim)
    similarity_pairwise = staticmethod(pairwise_cos_sim)

    def __init__(self, checkpoint: str | PathLike[str], *, truncate: bool = True, **options: Any):
        self.embedder = Embedder(checkpoint, truncate=truncate, **options)

    def encode(
        self,
        inputs: str | Sequence[str] | np.ndarray,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
    ) -> Any:
        """The vectors of texts [texts, dimensions], or of one text [dimensions].

        Returns:
            A tensor if `convert_to_tensor` is set, else a NumPy array if `convert_to_numpy` is, else a list of tensors.

        Raises:
            InputError: the texts cannot be run, or `prompt` contradicts the checkpoint's default prompt.
        """
        texts = [inputs] if isinstance(inputs, str) else list(map(str, inputs))
        if prompt is not None:
            if (default := self.embedder.engine.text.default_prompt_name) is not None:
                raise InputError(
                    f"prompt={prompt!r:.80} would follow the checkpoint's default prompt {default!r}; give prompt_name"
                )
            texts = [prompt + text for text in texts]
        vectors = self.embedder.embed(fill_empty(texts), prompt_name, truncate_dim)
        if precision not in (None, "float32"):
            vectors = quantize_embeddings(vectors, precision)
        if not convert_to_tensor and convert_to_numpy:
            return vectors[0] if isinstance(inputs, str) else vectors
        tensor = torch.from_numpy(vectors)
        if isinstance(inputs, str):
            return tensor[0]
        return tensor if convert_to_tensor else list(tensor)

    def encode_query(self, inputs: Any, prompt_name: str | None = None, **options: Any) -> Any:
        """As `encode`, with the prompt for queries if no other is given and the checkpoint has one."""
        return self.encode_with(self.embedder.query_prompt, inputs, prompt_name, options)

    def encode_document(self, inputs: Any, prompt_name: str | None = None, **options: Any) -> Any:
        """As `encode`, with the prompt for documents if no other is given and the checkpoint has one."""
        return self.encode_with(self.embedder.document_prompt, inputs, prompt_name, options)

    def encode_with(self, default: str | None, inputs: Any, prompt_name: str | None, options: dict[str, Any]) -> Any:
        if prompt_name is None and options.get("prompt") is None:
            prompt_name = default
        return self.encode(inputs, prompt_name, **options)
