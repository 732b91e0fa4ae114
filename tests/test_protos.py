"""`make lint` refuses changes of generation.proto that break clients."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUF = Path(sys.executable).with_name("buf")


def breaking(folder: Path, file: str = "", old: str = "", new: str = "") -> str:
    """What `buf breaking` says of the protos with one text replaced."""
    shutil.copy(ROOT / "buf.yaml", folder)
    shutil.copytree(ROOT / "protos", folder / "protos", ignore=shutil.ignore_patterns("*.py*"), dirs_exist_ok=True)
    if file:
        path = folder / "protos/loraplex_protos" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    command = [BUF, "breaking", "--against", "protos/baseline.binpb"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_only_a_change_that_clients_would_notice_is_refused(tmp_path: Path):
    assert breaking(tmp_path) == ""
    assert breaking(tmp_path, "generation.proto", "message Tool {", "message Tool {\n  string more = 99;") == ""
    assert 'Field "8" with name "n"' in breaking(tmp_path, "generation.proto", "uint32 n = 8;", "string n = 8;")
    assert 'Previously present RPC "Embed"' in breaking(tmp_path, "generation.proto", "rpc Embed(", "rpc Vectors(")
