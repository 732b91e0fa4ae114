"""Passes objects over a socket to another process of this machine: pickled, with adapters' files and memory beside it,
which are copied straight from where they are to where they stay.

Both ends must trust each other, and be forks of one process.
"""

import pickle
import socket
import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from io import BytesIO
from typing import Any

import torch

from loraplex_protos.errors import LoraplexError
from loraplex_shard.device.memory import reserve
from loraplex_shard.shapes.adapter import AdapterWeights

_NUMBER = struct.Struct("<Q")


def send(connection: socket.socket, value: object, shared: Mapping[str, object]) -> None:
    """Sends an object. `shared` are objects that the other end has as well: only their names are sent."""
    stream, buffers = BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, buffers, {id(each): name for name, each in shared.items()}).dump(value)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    connection.sendall(b"".join(map(_NUMBER.pack, (len(parts), *map(len, parts)))))
    for part in parts:
        connection.sendall(part)


def receive(connection: socket.socket, shared: Mapping[str, object]) -> Any:
    """Receives an object. Raises EOFError if the other end closes the connection before it has sent one."""
    (count,) = _NUMBER.unpack(_read(connection, _NUMBER.size))
    data, *buffers = (_read(connection, size) for (size,) in _NUMBER.iter_unpack(_read(connection, 8 * count)))
    return _Unpickler(BytesIO(data), buffers, shared).load()


def _read(connection: socket.socket, size: int) -> memoryview:
    data = memoryview(reserve(size).numpy())  # type: ignore[arg-type]  # numpy says it for 3.12 and newer
    filled = 0
    while filled < size:
        count = connection.recv_into(data[filled:])
        if not count:
            raise EOFError
        filled += count
    return data


class _Pickler(pickle.Pickler):
    def __init__(self, stream: BytesIO, buffers: list[pickle.PickleBuffer], names: Mapping[int, str]) -> None:
        super().__init__(stream, protocol=5, buffer_callback=buffers.append)
        self._names = names
        self._memory: torch.Tensor | None = None  # of the adapter whose tensors are being pickled

    def persistent_id(self, value: Any) -> str | None:
        return self._names.get(id(value))

    def reducer_override(self, value: Any) -> Any:
        match value:
            case memoryview():
                return memoryview, (pickle.PickleBuffer(value),)
            case torch.Tensor() if value is self._memory:
                return _whole, (pickle.PickleBuffer(memoryview(value.numpy())),)  # type: ignore[arg-type]
            case torch.Tensor():
                assert self._memory is not None
                start = value.data_ptr() - self._memory.data_ptr() if value.nbytes else 0
                return _view, (self._memory, start, value.nbytes, value.dtype, tuple(value.shape))
            case AdapterWeights():
                self._memory = value.memory
            case LoraplexError():
                return _error, (type(value), value.args, value.__dict__)
        if is_dataclass(value) and not isinstance(value, type) and not all(field.init for field in fields(value)):
            # What is computed from the other fields, such as tables of addresses, is computed again.
            return type(value), tuple(getattr(value, field.name) for field in fields(value) if field.init)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BytesIO, buffers: list[memoryview], shared: Mapping[str, object]) -> None:
        super().__init__(stream, buffers=buffers)
        self._shared = shared

    def persistent_load(self, name: str) -> object:
        return self._shared[name]


def _whole(buffer: memoryview) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else torch.empty(0, dtype=torch.uint8)


def _view(memory: torch.Tensor, start: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return memory[start : start + size].view(dtype).view(shape)


def _error(kind: type[LoraplexError], args: tuple[object, ...], attributes: dict[str, object]) -> LoraplexError:
    """An error whose constructor may take other arguments than it keeps."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error
