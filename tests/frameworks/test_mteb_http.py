"""MTEB evaluates the model behind the server, through its wrapper of OpenAI's wire format."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from funnel_engine import Engine
from served_models import save_embedder
from serving_apps import MAX_BATCH_TOKENS, application, listening

mteb = pytest.importorskip("mteb", reason="mteb is not installed")

TEXTS = ["a", "the small funnel pools pairs of tokens", "memory", "tokens and tokens", "tokens " * 1000]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def address(checkpoint):
    with application(checkpoint) as app, listening(app) as each:
        yield each


def make_wrapper(address, **options):
    from mteb.models.openai_wrappers import OpenAIAPIEncodeWrapper

    return OpenAIAPIEncodeWrapper(address, "embedder", **options)


def encode(wrapper):
    batches = DataLoader([{"text": text} for text in TEXTS], batch_size=2)
    metadata = mteb.get_task("STSBenchmark").metadata
    return wrapper.encode(batches, task_metadata=metadata, hf_split="test", hf_subset="default")


def test_it_gives_the_engines_vectors_and_cuts_what_is_too_long(address, checkpoint):
    engine = Engine.load(checkpoint, max_batch_tokens=MAX_BATCH_TOKENS)
    found = encode(make_wrapper(address, use_chat_template=False))
    np.testing.assert_allclose(found, engine.embed(TEXTS, truncate=True), atol=1e-5)


def test_chats_are_refused_with_the_remedy(address):
    with pytest.raises(Exception, match="use_chat_template=False"):
        encode(make_wrapper(address))
