"""A real server with the tiny model, and scripts that call it with unmodified clients."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.e2e.processes import Server
from tests.e2e.tiny import CHAT_TEMPLATE, save_adapter, save_model

THINKING = "{{ '<think>\n\n</think>\n' if enable_thinking is false else '<think>\n' }}"  # as in Qwen3's template


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("tiny-llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "matryoshka_dimensions": [8, 36]}))
    return folder


PAGE = "https://app.example"  # an origin whose pages may call the server


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        save_adapter(model, adapters / name, 8, seed=seed)
    shutil.copytree(adapters / "first", adapters / "thinking")
    (adapters / "thinking" / "chat_template.jinja").write_text(f"{CHAT_TEMPLATE}{THINKING}")
    shutil.copytree(adapters / "first", adapters / "broken")
    (adapters / "broken" / "adapter_model.safetensors").write_bytes(b"")
    flags = f"--adapters={adapters}", "--kv-blocks=256", "--threads=1", f"--cors-origins={PAGE}"
    with Server(str(model), *flags) as running:
        yield running
        running.assert_nothing_is_held()


@pytest.fixture
def base(model: Path) -> str:
    return str(model)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as connected:
        yield connected


@pytest.fixture
def run_script(old_python: Path, server: Server) -> Callable[[str], None]:
    """Runs a Python script with the old clients. The server's URL is its argument; it fails by raising."""

    def run(script: str) -> None:
        command = [str(old_python), "-c", script, server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    return run
