"""The files of an adapter that are sent instead of being read from a source. They are written to memory that another
process can read, as they arrive."""

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from loraplex_protos.errors import AdapterInvalidError, quote
from loraplex_shard.device.handed_memory import HandedMemory
from loraplex_shard.lora.sources.files import AdapterFiles, assemble, choose

NAME = "upload"  # in place of a source's


@dataclass(frozen=True, slots=True)
class Upload:
    """The files of an adapter in memory: the first and the last byte's place of each, by name."""

    memory: HandedMemory
    places: Mapping[str, slice]

    def read(self) -> AdapterFiles:
        """Copies nothing."""
        whole = self.memory.map().numpy().data
        return assemble({name: whole[place] for name, place in self.places.items()})


def check_upload(sizes: Mapping[str, int]) -> None:
    """Raises AdapterInvalidError unless files with these names and sizes are an adapter and nothing else."""
    if unknown := sorted(sizes.keys() - set(choose(sizes))):
        raise AdapterInvalidError(f"{quote(unknown[0])} is not a file that an adapter is read from: leave it out")


@contextmanager
def received(sizes: Mapping[str, Mapping[str, int]], data: Iterator[bytes]) -> Iterator[dict[str, Upload]]:
    """A context in which there are uploads of these names, from their files' contents one after the other. Raises
    AdapterInvalidError if there is too much or too little of it."""
    places, size = dict[str, dict[str, slice]](), 0
    for upload, files in sizes.items():
        places[upload] = {}
        for name, own in files.items():
            places[upload][name] = slice(size, size + own)
            size += -(-own // mmap.PAGESIZE) * mmap.PAGESIZE  # tensors are aligned in their file
    with HandedMemory.of(size) as memory:
        _fill(memory, [place for files in places.values() for place in files.values()], data)
        yield {upload: Upload(memory, files) for upload, files in places.items()}


def _fill(memory: HandedMemory, places: list[slice], data: Iterator[bytes]) -> None:
    unfilled = [range(place.start, place.stop) for place in places if place.start < place.stop]
    for chunk in data:
        rest = memoryview(chunk)
        while len(rest):
            if not unfilled:
                raise AdapterInvalidError("the upload has more bytes than its files' sizes add up to")
            count = min(len(rest), len(unfilled[0]))
            memory.write(rest[:count], unfilled[0].start)
            rest, unfilled[0] = rest[count:], unfilled[0][count:]
            if not unfilled[0]:
                del unfilled[0]
    if unfilled:
        missing = sum(map(len, unfilled))
        raise AdapterInvalidError(f"the upload was cut short: {missing} bytes of its files are missing")
