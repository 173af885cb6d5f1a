"""What the routes say about the model."""

from importlib.metadata import version

from funnel_engine import HeadConfig
from funnel_serving.settings import Settings


def model_name(settings: Settings) -> str:
    """The name that clients ask for."""
    return settings.model_name or settings.checkpoint.resolve().name


def kind_of(head: HeadConfig) -> str:
    """As TEI names kinds of models. A classifier of sequences with one label gives the relevance of a pair of texts."""
    if head.task == "classify":
        return "reranker" if len(head.labels) == 1 else "classifier"
    return "tagger" if head.task == "tag" else "embedding"


def engine_version() -> str:
    return version("funnel-engine")
