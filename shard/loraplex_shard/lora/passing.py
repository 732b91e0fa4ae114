"""Passes objects over a socket to another process of this machine: pickled, with adapters' memory beside it, which is
put into memory that both map: who receives it copies nothing. HandedMemory is handed over as it is.

Both ends must trust each other, and be forks of one process.
"""

import ctypes
import mmap
import os
import pickle
import socket
import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from io import BytesIO
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from loraplex_protos.errors import LoraplexError
from loraplex_shard.device.handed_memory import HandedMemory
from loraplex_shard.device.memory import view_at
from loraplex_shard.shapes.adapter import AdapterWeights, LayerWeights, moved
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.shapes.own_weights import OwnWeights

_HEADER = struct.Struct("<QQ")  # bytes of the pickled object, and buffers
_SIZE = struct.Struct("<Q")
_MOST_HANDED = 8  # HandedMemory in one object


def send(connection: socket.socket, value: object, shared: Mapping[str, object]) -> None:
    """Sends an object. `shared` are objects that the other end has as well: only their names are sent."""
    stream, buffers, handed = BytesIO(), list[pickle.PickleBuffer](), list[HandedMemory]()
    _Pickler(stream, buffers, handed, {id(each): name for name, each in shared.items()}).dump(value)
    contents = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    sizes = [content.nbytes for content in contents]
    with HandedMemory.of(sum(map(_in_pages, sizes))) as memory:
        mapped = memory.map()
        place = mapped.data_ptr()
        for content in contents:
            ctypes.memmove(place, content.ctypes.data, content.nbytes)
            place += _in_pages(content.nbytes)
        header = _HEADER.pack(stream.tell(), len(sizes))
        socket.send_fds(connection, [header], [memory.fd, *(each.fd for each in handed)])
    connection.sendall(b"".join(map(_SIZE.pack, sizes)))
    connection.sendall(stream.getbuffer())


def receive(connection: socket.socket, shared: Mapping[str, object]) -> Any:
    """Receives an object. Raises EOFError if the other end closes the connection before it has sent one."""
    header, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 1 + _MOST_HANDED, socket.MSG_WAITALL)
    if not descriptors:
        raise EOFError
    first, *handed = (HandedMemory(fd, os.fstat(fd).st_size) for fd in descriptors)
    with first as memory:
        if len(header) < _HEADER.size:
            raise EOFError
        size, count = _HEADER.unpack(header)
        sizes = [own for (own,) in _SIZE.iter_unpack(_read(connection, _SIZE.size * count))]
        data = _read(connection, size)
        whole = memory.map(populate=True).numpy().data
    starts = accumulate(map(_in_pages, sizes), initial=0)
    buffers = [whole[start : start + own] for start, own in zip(starts, sizes, strict=False)]
    return _Unpickler(BytesIO(data), buffers, handed, shared).load()


def _in_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _read(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while len(rest):
        if not (count := connection.recv_into(rest)):
            raise EOFError
        rest = rest[count:]
    return data


class _Pickler(pickle.Pickler):
    def __init__(
        self,
        stream: BytesIO,
        buffers: list[pickle.PickleBuffer],
        handed: list[HandedMemory],
        names: Mapping[int, str],
    ) -> None:
        super().__init__(stream, protocol=5, buffer_callback=buffers.append)
        self._handed = handed
        self._names = names
        self._memory: torch.Tensor | None = None  # of the adapter whose tensors are being pickled

    def persistent_id(self, value: Any) -> str | int | None:
        if isinstance(value, HandedMemory):
            if value not in self._handed:
                self._handed.append(value)
            return self._handed.index(value)
        return self._names.get(id(value))

    def reducer_override(self, value: Any) -> Any:
        match value:
            case torch.Tensor() if value is self._memory:
                return _whole, (pickle.PickleBuffer(memoryview(value.numpy())),)  # type: ignore[arg-type]
            case torch.Tensor():
                assert self._memory is not None
                start = value.data_ptr() - self._memory.data_ptr() if value.nbytes else 0
                return view_at, (self._memory, start, value.dtype, tuple(value.shape))
            case AdapterWeights():
                self._memory = value.memory
                made = value.table.numpy().tobytes(), tuple(value.table.shape), value.memory.data_ptr()
                return _adapter, (value.layers, value.layer_count, value.memory, value.classifier, value.own, *made)
            case LoraplexError():
                return _error, (type(value), value.args, value.__dict__)
        if is_dataclass(value) and not isinstance(value, type):
            # What is computed from the other fields, such as tables of addresses, is computed again.
            return type(value), tuple(getattr(value, field.name) for field in fields(value) if field.init)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, stream: BytesIO, buffers: list[memoryview], handed: list[HandedMemory], shared: Mapping[str, object]
    ) -> None:
        super().__init__(stream, buffers=buffers)
        self._handed = handed
        self._shared = shared

    def persistent_load(self, name: str | int) -> object:
        return self._handed[name] if isinstance(name, int) else self._shared[name]


def _whole(buffer: memoryview) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else torch.empty(0, dtype=torch.uint8)


def _adapter(
    layers: Mapping[str, LayerWeights],
    layer_count: int,
    memory: torch.Tensor,
    classifier: Classifier | None,
    own: OwnWeights,
    table: bytes,
    shape: tuple[int, int],
    start: int,
) -> AdapterWeights:
    """An adapter whose memory began at `start` in the process that made its table."""
    made = torch.from_numpy(np.frombuffer(table, np.int64).reshape(shape).copy())
    return AdapterWeights(layers, layer_count, memory, classifier, own, moved(made, memory.data_ptr() - start))


def _error(kind: type[LoraplexError], args: tuple[object, ...], attributes: dict[str, object]) -> LoraplexError:
    """An error whose constructor may take other arguments than it keeps."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error
