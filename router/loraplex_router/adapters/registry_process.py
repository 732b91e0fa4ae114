"""Reads the adapter registry, in a process of its own if it is long."""

from pathlib import Path

import orjson

from loraplex_router.access.read_beside import read_beside, write_answer
from loraplex_router.adapters.registry import Registered
from loraplex_router.adapters.registry_content import RegistryFileError, read_registry
from loraplex_router.vocabulary.references import AdapterReference, Version


def read_registry_beside(path: Path) -> Registered:
    """As read_registry. Blocks, but hardly holds the interpreter's lock."""
    return read_beside(path, read_registry, __name__, _decode, RegistryFileError)


def _encode(content: Registered) -> bytes:
    names = {
        name: [
            (each.number, each.origin.id, each.origin.source, each.origin.revision, each.digest, each.fault)
            for each in versions.values()
        ]
        for name, versions in content.names.items()
    }
    return orjson.dumps((names, content.aliases))


def _decode(data: bytes) -> Registered:
    names, aliases = orjson.loads(data)
    return Registered(
        {
            name: {
                number: Version(name, number, AdapterReference(id, source, revision), digest, fault)
                for number, id, source, revision, digest, fault in versions
            }
            for name, versions in names.items()
        },
        aliases,
    )


if __name__ == "__main__":
    write_answer(lambda path: _encode(read_registry(path)))
