"""Documents refer to existing files, headings and source files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "charts", "examples", "tests", ".")
DOCUMENTS = sorted(
    {path for folder in FOLDERS for path in (ROOT / folder).glob("*.md")} | {*ROOT.glob("*/*/README.md")}
)
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("bench", "charts", "client", "docs", "protos", "router", "shard", "tests")
    for path in (ROOT / folder).rglob("*.*")
]


def headings(text: str) -> set[str]:
    """The headings as GitHub names them in links."""
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_in_a_document_work(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if not re.match(r"\w+:", link):
            name, _, heading = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not heading or heading in headings(target.read_text()), link


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "tests/README.md", *(ROOT / "docs").glob("*.md")])
def test_code_in_a_document_fits_a_narrow_page(document: str | Path) -> None:
    blocks = re.findall(r"^```.*?^```", (ROOT / document).read_text(), re.M | re.S)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md", "tests/README.md"])
def test_source_files_that_a_document_names_exist(document: str) -> None:
    named = re.findall(r"`([\w./-]+\.(?:py|proto|cpp|h))`", (ROOT / document).read_text())
    assert named
    assert not [name for name in named if not any(f"/{source}".endswith(f"/{name}") for source in SOURCES)]


FOREIGN = {"llama.cpp", "immintrin.h", "fcntl.h", "unistd.h"}  # words that look like our files


@pytest.mark.parametrize("package", ["router", "shard", "client", "protos"])
def test_source_files_named_in_other_source_files_exist(package: str) -> None:
    named = {
        (source, name)
        for source in SOURCES
        if source.startswith(f"{package}/")
        and source.endswith((".py", ".proto", ".cpp", ".h"))
        and "_pb2" not in source
        for name in re.findall(r"(?<![\w.<*/-])([a-z][\w/]*\.(?:py|proto|cpp|h))\b", (ROOT / source).read_text())
    }
    assert [
        pair for pair in named if pair[1] not in FOREIGN and not any(f"/{s}".endswith(f"/{pair[1]}") for s in SOURCES)
    ] == []


def test_each_limit_of_the_security_policy_has_a_test() -> None:
    rows = re.findall(r"^\| (?!what strangers|---)(.*) \| (.*) \| (.*) \|$", (ROOT / "SECURITY.md").read_text(), re.M)
    assert rows
    for what, _, tests in rows:
        named = re.findall(r"`([\w./]+)::(\w+)`", tests)
        assert named, what
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{what}: {name}"
