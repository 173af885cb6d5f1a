"""Why a request gets no result: one exception, whose `kind` is one of a closed set."""

# The kinds, each with its HTTP status. A route that imitates another server may answer with that server's status.
KINDS = {
    "empty": 400,  # no inputs, or an empty one
    "validation": 400,  # a field that is missing, of a wrong type or out of its range, or an input that is too long
    "unsupported": 400,  # this checkpoint cannot do it: no classifier, no tokenizer, no pairs of texts
    "unauthorized": 401,
    "not_found": 404,
    "method": 405,
    "slow_body": 408,  # the body did not come in time
    "too_large": 413,  # the body, or a request that cannot fit into the queue even if it is empty
    "tokenization": 422,  # the tokenizer cannot read a text
    "overloaded": 429,  # the queue is full now; `retry_after` says when to come back
    "inference": 500,  # the engine failed, or a result is not finite
    "unhealthy": 503,  # the model is not loaded yet, or the server stops
    "timeout": 504,  # the deadline of the request passed
}


class Refusal(Exception):
    """A request that is not answered with a result. The message names the value, the limit and the remedy.

    Attributes:
        kind: a key of `KINDS`.
        status: its HTTP status.
        message: what is wrong, for the client.
        param: the field of the request that is wrong, if it is one.
        retry_after: after how many seconds it is worth to send the request again, if it is.
    """

    def __init__(self, kind: str, message: str, *, param: str | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.kind, self.status, self.message = kind, KINDS[kind], message
        self.param, self.retry_after = param, retry_after

    @classmethod
    def invalid(cls, message: str, *, param: str | None = None) -> "Refusal":
        """A field that cannot be read."""
        return cls("validation", message, param=param)
