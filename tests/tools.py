"""Programs that are not Python packages. Tests that need a missing one are skipped, which the last line reports. With
CI=true they fail instead, because CI must run all tests."""

import os
import shutil

import pytest

IN_CI = os.environ.get("CI") == "true"
ABSENT = " is absent (Debian: "


def needs(program: str, package: str) -> pytest.MarkDecorator:
    reason = f"{program}{ABSENT}{package})"
    return pytest.mark.skipif(not shutil.which(program) and not IN_CI, reason=reason)


def describe_skipped(reports: list[pytest.TestReport]) -> str | None:
    """Which tests were skipped because a program is missing."""
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in reports if isinstance(report.longrepr, tuple)]
    found = [reason for reason in reasons if ABSENT in reason]
    return f"{len(found)} tests were skipped: {', '.join(sorted(set(found)))}" if found else None


needs_promtool = needs("promtool", "prometheus")
needs_prometheus = needs("prometheus", "prometheus")
needs_redis = needs("redis-server", "redis-server")
needs_chromium = needs("chromium", "chromium")
