"""The errors of the whole project. Every message names the value, the limit and the remedy."""


class FunnelError(Exception):
    """Base class of every error that a user of this project can cause."""


class ConfigError(FunnelError):
    """An option, or a combination of options, that is not valid for any model or funnel."""


class CheckpointError(FunnelError):
    """A checkpoint that is missing, damaged, or in a form that the engine cannot represent."""


class InputError(FunnelError):
    """Texts, token ids or arrays that the engine cannot run."""


class BackendUnavailable(FunnelError):
    """A backend that is not available here, or that does not support the call."""
