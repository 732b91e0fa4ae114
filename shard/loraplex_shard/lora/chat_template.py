"""An adapter's own chat template, as transformers saves it: a file of its own, or a field of the tokenizer's config.

Knows nothing of what a template means: the router renders it.
"""

import json

from loraplex_protos.errors import AdapterInvalidError

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILES = (TEMPLATE, TOKENIZER_CONFIG)  # the first of them that is there counts

MAX_BYTES = 2**18


def read_chat_template(name: str, data: bytes) -> str:
    """The template in one of TEMPLATE_FILES, empty if it holds none. Raises AdapterInvalidError, naming the file."""
    try:
        text = data.decode()
        template = text if name == TEMPLATE else _configured(json.loads(text))
        size = len(template.encode())
    except (ValueError, RecursionError) as error:
        raise AdapterInvalidError(f"{name} cannot be read: {error}") from error
    if size > MAX_BYTES:
        raise AdapterInvalidError(f"{name}: the chat template has more than {MAX_BYTES} bytes")
    return template


def _configured(config: object) -> str:
    """Of several templates, the one that is called default."""
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = entries[0].get("template") if entries else None
    if found is not None and not isinstance(found, str):
        raise ValueError("chat_template is no text")
    return found or ""
