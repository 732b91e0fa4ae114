"""`loraplex kernels build`, with a fake compiler."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loraplex.cli.main import app
from loraplex_shard.kernels import library
from loraplex_shard.kernels.library import INSTRUCTION_SETS
from loraplex_shard.ops import choose

pytestmark = pytest.mark.slow

# Like a compiler on arm64: x86's flags are errors. It "compiles" by creating the file after -o.
COMPILER = """#!/bin/sh
for argument; do
    case $argument in -m*) echo "unrecognized option '$argument'" >&2; exit 1;; esac
    [ "$last" = -o ] && touch "$argument"
    last=$argument
done
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "c++"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def build(*flags: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["kernels", "build", *flags])
    return result.exit_code, result.stdout, result.stderr


def test_all_builds_what_the_compiler_supports_and_names_the_rest(compiler: Path, tmp_path: Path):
    status, paths, skipped = build("--all", f"--directory={tmp_path}/kernels")
    assert status == 0
    (path,) = map(Path, paths.split())
    assert path.name.startswith("portable-") and path.exists()
    assert [line.split(":")[0] for line in skipped.splitlines()] == [
        f"no kernels for {name}" for name in INSTRUCTION_SETS if name != "portable"
    ]


def test_a_folder_that_others_can_write_to_is_not_loaded_from(compiler: Path, tmp_path: Path):
    path = library.build(tmp_path / "kernels", "portable")
    assert path.parent.stat().st_mode & 0o777 == 0o700 and library.build(path.parent, "portable") == path
    path.chmod(0o777)
    with pytest.raises(library.KernelsError, match="other users can write"):
        library.build(path.parent, "portable")


def test_a_compiler_that_fails_is_an_error(compiler: Path, tmp_path: Path):
    compiler.write_text("#!/bin/sh\necho it is broken >&2; exit 1")
    status, paths, errors = build("--all", f"--directory={tmp_path}/kernels")
    assert (status, paths) == (1, "") and "it is broken" in errors


def test_a_missing_compiler_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    status, _, errors = build("--all", f"--directory={tmp_path}/kernels")
    assert status == 1 and "/nowhere/c++" in errors


def test_a_compiler_without_this_processors_best_instructions_builds_the_next_best(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(choose, "instruction_sets", lambda: ["amx", "portable"])
    monkeypatch.setattr(choose, "Kernels", lambda path: path)
    kernels = choose.load_kernels(torch.device("cpu"), tmp_path)
    assert isinstance(kernels, Path) and kernels.name.startswith("portable-")
    (warning,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "no CPU kernels for amx" in warning and "unrecognized option" in warning


def test_the_kernels_for_this_machine_are_the_best_that_the_compiler_supports(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(library, "instruction_sets", lambda: ["amx", "portable"])
    status, paths, skipped = build(f"--directory={tmp_path}/kernels")
    assert status == 0 and "no kernels for amx" in skipped
    (path,) = map(Path, paths.split())
    assert path.name.startswith("portable-") and path.exists()


def test_a_process_that_may_not_use_the_tile_registers_works_without_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(INSTRUCTION_SETS["amx"][1], True))
    monkeypatch.setattr(library, "_tiles_granted", lambda: False)
    assert library.instruction_sets() == ["avx512_bf16", "avx512", "portable"]
    monkeypatch.setattr(library, "_tiles_granted", lambda: True)
    assert library.instruction_set() == "amx"
