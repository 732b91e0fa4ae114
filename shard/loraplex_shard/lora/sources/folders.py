"""Finds folders in the adapter directory by their names, and never outside of it."""

import os
from pathlib import Path

from loraplex_protos.adapter_names import is_name, normal

CACHED = "models--"  # the hub's cache has a folder models--org--name for each repository


def find_folder(root: Path, id: str) -> Path | None:
    """The folder of an adapter, which may be faulty. None if there is no such folder, or if it leads out of the root.
    The root must be resolved."""
    if not is_name(id):
        return None
    folder = _descend(root, id)
    if folder is None and (folder := find_snapshot(root / cached_name(id))) is None:
        return None
    return folder.resolve() if is_inside(folder, root) and folder.is_dir() else None


def find_snapshot(folder: Path) -> Path | None:
    """The snapshot of a repository in the hub's cache: the commit of its default branch, or else the newest one."""
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
    """The name of an id's folder in the hub's cache."""
    return CACHED + id.replace("/", "--")


def cached_id(name: str) -> str:
    """The hub id of a folder in the hub's cache."""
    return name.removeprefix(CACHED).replace("--", "/")


def is_inside(path: Path, root: Path) -> bool:
    """Whether the path exists and, with links followed, is below the root. The root must be resolved."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return False


def _descend(root: Path, id: str) -> Path | None:
    path = root.joinpath(*id.split("/"))
    if os.path.lexists(path) or id.isascii():
        return path if os.path.lexists(path) else None
    found = root
    for part in id.split("/"):  # a name on disk may be in another Unicode form
        try:
            names = [name for name in os.listdir(found) if normal(name) == normal(part)]
        except OSError:
            return None
        if not names:
            return None
        found /= names[0]
    return found
