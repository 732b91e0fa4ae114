"""The code on the two pages about clients, unchanged except for the server's address."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Server
from tests.e2e.tiny import save_adapter

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture(scope="module")
def shown(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose adapters have the names on the pages."""
    adapters = tmp_path_factory.mktemp("shown")
    for name in ("sentiment", "entities"):
        save_adapter(model, adapters / name, 4, seed=1)
    with Server(str(model), f"--adapters={adapters}", "--kv-blocks=256", "--threads=1") as running:
        yield running


def run(command: list[str], script: str, server: Server) -> str:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    text = script.replace("http://localhost:3000", server.url)
    done = subprocess.run(
        [*command, text], capture_output=True, text=True, errors="replace", timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", blocks("coming-from-lorax.md", "python"))
def test_the_code_for_lorax_clients_works(shown: Server, old_python: Path, script: str):
    assert "FinishReason" in run([str(old_python), "-c"], script, shown)


@pytest.mark.parametrize("script", blocks("coming-from-lorax.md", "sh"))
def test_the_plain_routes_answer(shown: Server, script: str):
    answer = run(["bash", "-ec"], script.replace("curl ", "curl -sS --fail-with-body "), shown)
    assert "generated_text" in answer and "data: " in answer and "swagger" in answer


@pytest.mark.parametrize("script", [*blocks("openai.md", "python"), *blocks("anthropic.md", "python")])
def test_the_code_for_openai_and_anthropic_clients_works(shown: Server, script: str):
    assert run([sys.executable, "-c"], script, shown).strip()
