import subprocess
import sys
from pathlib import Path
from types import ModuleType

import loraplex

STARTED = "from loraplex_command import main; main()"  # what the script in bin/ does


def test_all_lists_what_is_exported() -> None:
    exported = [
        name for name, value in vars(loraplex).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    assert loraplex.__all__ == sorted(exported)


def test_every_error_that_the_server_can_raise_is_exported() -> None:
    from loraplex_protos.errors import ERROR_TYPES

    for error in ERROR_TYPES.values():
        assert getattr(loraplex, error.__name__) is error


def test_importing_the_sdk_imports_nothing_of_the_server() -> None:
    code = "import sys, loraplex; print(*{name.partition('.')[0] for name in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "transformers", "numpy", "pydantic", "fastapi", "loraplex_router", "loraplex_shard", "typer"}
    assert "loraplex" in modules
    assert not heavy & set(modules)


def test_ctrl_c_ends_the_command_without_a_traceback_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "grpc.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {STARTED}"]
    ended = subprocess.run([*command, "serve"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")
