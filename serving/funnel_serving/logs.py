"""Logs as one JSON object per line, on standard error."""

import datetime
import logging
import re
import secrets

import orjson

SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")  # of a request; anything else could forge lines of other logs
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime"}  # what every record has


class JsonFormatter(logging.Formatter):
    """The time, level, logger and message of a record, then its `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in STANDARD},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def log_as_json() -> None:
    """Makes all logs of the process JSON lines, and warnings of Python too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    logging.getLogger("funnel_serving").setLevel(logging.INFO)


def request_id(given: bytes | None) -> str:
    """The id that the client gave, if it is sane, or a new one."""
    return given.decode() if given is not None and SANE_ID.fullmatch(given) else secrets.token_hex(8)
