"""Folders in the adapter directory: found by their names, and never outside of it."""

import os
from pathlib import Path

from loraplex_protos.adapter_names import is_name, normal

CACHED = "models--"  # how the hub's cache calls a repository's folder: models--org--name


def find_folder(root: Path, id: str) -> Path | None:
    """Where an adapter's files are, be it sound or not. None if there is nothing of that name, or it leads out of the
    root, which is resolved."""
    if not is_name(id):
        return None
    folder = _descend(root, id)
    if folder is None and (folder := find_snapshot(root / cached_name(id))) is None:
        return None
    return folder.resolve() if is_inside(folder, root) and folder.is_dir() else None


def find_snapshot(folder: Path) -> Path | None:
    """Of a repository in the hub's cache, the commit that its default branch is at, else the newest one."""
    if not folder.name.startswith(CACHED):
        return None
    try:
        commits = {path.name: path for path in (folder / "snapshots").iterdir() if path.is_dir()}
        main = folder / "refs" / "main"
        named = main.read_text().strip() if main.is_file() else ""
        return commits.get(named) or max(commits.values(), key=lambda path: path.stat().st_mtime, default=None)
    except (OSError, UnicodeDecodeError):
        return None


def cached_name(id: str) -> str:
    """How the hub's cache calls the folder of an id."""
    return CACHED + id.replace("/", "--")


def cached_id(name: str) -> str:
    """The hub's id for the name of a folder in its cache."""
    return name.removeprefix(CACHED).replace("--", "/")


def is_inside(path: Path, root: Path) -> bool:
    """Whether the path exists and leads, links followed, to something below the root, which is resolved."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return False


def _descend(root: Path, id: str) -> Path | None:
    path = root.joinpath(*id.split("/"))
    if os.path.lexists(path) or id.isascii():
        return path if os.path.lexists(path) else None
    found = root
    for part in id.split("/"):  # a file system may keep another Unicode form than the one that is asked for
        try:
            names = [name for name in os.listdir(found) if normal(name) == normal(part)]
        except OSError:
            return None
        if not names:
            return None
        found /= names[0]
    return found
