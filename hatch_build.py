"""Compiles protos/ whenever the project is built or installed, editable installs included."""

from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLUGINS = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")


class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        protos = Path(self.root, "protos")
        outputs = [f"--{plugin}={protos}" for plugin in PLUGINS]
        files = [str(path) for path in protos.rglob("*.proto")]
        if protoc.main(["protoc", f"-I{protos}", *outputs, *files]):
            raise RuntimeError("protoc failed")
