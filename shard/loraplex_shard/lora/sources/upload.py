"""The files of an adapter that are sent instead of being read from a source."""

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

from loraplex_protos.errors import AdapterInvalidError, quote
from loraplex_shard.lora.sources.files import AdapterFiles, assemble, choose, new_buffer

K = TypeVar("K", bound=Hashable)

NAME = "upload"  # in place of a source's


def check_upload(sizes: Mapping[str, int]) -> None:
    """Raises AdapterInvalidError unless files with these names and sizes are an adapter and nothing else."""
    if unknown := sorted(sizes.keys() - set(choose(sizes))):
        raise AdapterInvalidError(f"{quote(unknown[0])} is not a file that an adapter is read from: leave it out")


def receive(sizes: Mapping[str, int], data: Iterator[bytes]) -> AdapterFiles:
    """The files, from their contents one after the other. Raises AdapterInvalidError if there is too much or too little
    of it."""
    return assemble(_fill(sizes, data))


def receive_each(sizes: Mapping[str, Mapping[str, int]], data: Iterator[bytes]) -> dict[str, AdapterFiles]:
    """The files of several adapters, by digest. Raises AdapterInvalidError as `receive` does."""
    contents = _fill({(digest, name): size for digest, files in sizes.items() for name, size in files.items()}, data)
    return {digest: assemble({name: contents[digest, name] for name in files}) for digest, files in sizes.items()}


def _fill(sizes: Mapping[K, int], data: Iterator[bytes]) -> dict[K, memoryview]:
    contents = {name: new_buffer(size) for name, size in sizes.items()}
    unfilled = [buffer for buffer in contents.values() if len(buffer)]
    for chunk in data:
        rest = memoryview(chunk)
        while len(rest):
            if not unfilled:
                raise AdapterInvalidError("the upload has more bytes than its files' sizes add up to")
            count = min(len(rest), len(unfilled[0]))
            unfilled[0][:count] = rest[:count]
            rest, unfilled[0] = rest[count:], unfilled[0][count:]
            if not len(unfilled[0]):
                del unfilled[0]
    if unfilled:
        missing = sum(map(len, unfilled))
        raise AdapterInvalidError(f"the upload was cut short: {missing} bytes of its files are missing")
    return contents
