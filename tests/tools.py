"""Programs that are not Python packages; tests that need one are skipped where it is absent."""

import shutil

import pytest

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is absent")
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is absent")
