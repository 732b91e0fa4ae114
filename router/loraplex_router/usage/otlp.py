"""Usage events as OpenTelemetry's log events. Imported only if there is a collector: it needs the extra `traces`."""

from typing import Any

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider

EVENT = "loraplex.usage"


class UsageLogEvents:
    """Sends each event with its fields as attributes."""

    def __init__(self, provider: LoggerProvider) -> None:
        self._provider = provider
        self._logger = provider.get_logger("loraplex.router")

    def __call__(self, described: dict[str, Any]) -> None:
        attributes = {f"loraplex.{name}": value for name, value in described.items() if value is not None}
        self._logger.emit(LogRecord(event_name=EVENT, severity_number=SeverityNumber.INFO, attributes=attributes))

    def close(self) -> None:
        """Sends remaining events."""
        self._provider.shutdown()
