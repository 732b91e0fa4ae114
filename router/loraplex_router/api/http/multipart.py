"""Splits the files of a multipart/form-data body that is in memory, without copying them."""

from email.message import Message
from email.parser import BytesHeaderParser

from loraplex_protos.errors import FieldViolation, InvalidRequestError

MAX_HEADERS = 8192  # bytes, of a part
MAX_FILES = 64


def split_files(body: memoryview, content_type: str) -> dict[str, memoryview]:
    """The parts' contents, by their file names (or else by their names). Raises InvalidRequestError."""
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_param("boundary")
    if header.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise _refusal("must be multipart/form-data, with adapter_config.json and adapter_model.safetensors")
    data, delimiter = body.obj, b"--" + boundary.encode("latin-1", "replace")
    assert isinstance(data, bytes | bytearray)
    found = dict[str, memoryview]()
    at = data.find(delimiter)
    while at >= 0:
        at += len(delimiter)
        if data[at : at + 2] == b"--":
            return found
        begin = data.find(b"\r\n\r\n", at, at + MAX_HEADERS) + 4
        end = data.find(b"\r\n" + delimiter, begin - 2)
        if begin < 4 or end < 0:
            break
        name = _name(bytes(data[at + 2 : begin]))
        if name in found or len(found) == MAX_FILES:
            raise _refusal(f"name 1 to {MAX_FILES} files, each once")
        found[name] = body[begin : max(begin, end)]
        at = end + 2
    raise _refusal("the parts cannot be told apart, or the last one was cut short")


def _name(headers: bytes) -> str:
    part = BytesHeaderParser().parsebytes(headers)
    name = part.get_filename() or part.get_param("name", header="content-disposition")
    if not isinstance(name, str) or not name:
        raise _refusal("every part needs a file name")
    return name


def _refusal(why: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation("files", why))
