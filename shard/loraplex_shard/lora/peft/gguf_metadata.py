"""The metadata of llama.cpp's adapters (GGUF files), which stand for an adapter_config.json."""

import json

from loraplex_protos.errors import AdapterInvalidError

MAGIC = b"GGUF"  # the beginning of a file
MAX_HEADER_BYTES = 16 * 2**20


def read_metadata(beginning: memoryview) -> bytes:
    """The metadata of a file, of which this is the beginning, as JSON. Raises AdapterInvalidError if they cannot be
    read."""
    # Most adapters are not GGUF files, and importing the reader takes a second.
    from loraplex_shard.checkpoint.base import CheckpointError
    from loraplex_shard.checkpoint.gguf.file import read_header

    try:
        return json.dumps(read_header(beginning[:MAX_HEADER_BYTES], "the GGUF file").metadata).encode()
    except CheckpointError as error:
        raise AdapterInvalidError(str(error)) from None
