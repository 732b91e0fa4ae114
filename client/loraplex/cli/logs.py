"""How the services write their logs: one line per record on stderr, as text or as JSON.

A record may have its own values, as in `logger.info("text", extra={"fields": {...}})`; None is left out.
"""

import json
import logging
import warnings
from datetime import UTC, datetime

from loraplex.cli.log_writer import LogWriter

STDERR = 2  # the open file

# The packages that may log below WARNING. Libraries do it often, and log whole URLs, signatures included.
OURS = "loraplex", "loraplex_protos", "loraplex_router", "loraplex_shard"


def configure(log_format: str, **everywhere: object) -> None:
    """Call this once, when a service starts. `log_format` is text or json; the values `everywhere` are added to each
    record. Before os._exit, call logging.shutdown, which writes what is not written yet."""
    handler = LogWriter(STDERR)
    handler.addFilter(Always(everywhere))
    handler.addFilter(shorten)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level="WARNING", handlers=[handler])
    for package in OURS:
        logging.getLogger(package).setLevel("INFO")
    warnings.showwarning = _log_warning


def _log_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Logs a library's warning as a record, instead of printing it with its line of source."""
    logging.getLogger("py.warnings").warning("%s", message)


def shorten(record: logging.LogRecord) -> bool:
    """A filter that keeps one line of what gRPC logs, with long traces, of calls that anybody can make: the name of a
    method is not a text, or the caller has left."""
    error = record.exc_info[1] if record.exc_info else None
    if record.name.startswith("grpc") and type(error).__name__ in ("UnicodeDecodeError", "ExecuteBatchError"):
        record.exc_info = None
    return True


class Always(logging.Filter):
    """Adds the same values to every record."""

    def __init__(self, values: dict[str, object]) -> None:
        super().__init__()
        self._values = values

    def filter(self, record: logging.LogRecord) -> bool:
        record.fields = self._values | getattr(record, "fields", {})
        return True


class TextFormatter(logging.Formatter):
    """12:30:05 INFO message name=value name=value"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        values = (f" {name}={_text(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + "".join(values)


class JsonFormatter(logging.Formatter):
    """An object with time (UTC), level, logger and message, the record's values, and the exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value is not None}


def _text(value: object) -> str:
    """The value on one line, so that programs can read it: a text is quoted if it is not a single plain word."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if isinstance(value, str) and not (value.isascii() and value.isprintable() and value and " " not in value):
        return json.dumps(value)
    return str(value)
