"""Sources of adapters on loopback, in a process of their own, so that they do not delay the one that measures."""

import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.stand_in_hub import StandInHub
from tests.stand_in_stores import StandInS3

BUCKET = "adapters"


@contextmanager
def serving_sources(folders: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """Serves these adapters, by name, as a hub and as an S3 bucket. Gives the variables that lead a server there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, dict(folders)), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection, folders: dict[str, Path]) -> None:
    contents = {folder: _read(folder) for folder in set(folders.values())}
    with pytest.MonkeyPatch.context() as patch, StandInHub() as hub, StandInS3(patch) as store:
        for name, folder in folders.items():
            hub.push(name, contents[folder])
            store.push(f"{BUCKET}/{name}", contents[folder])
        connection.send({"HF_ENDPOINT": hub.url, **store.environment(store.url)})
        connection.poll(None)  # until the process is ended


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
