"""What transformers calls a text model's modules: its versions have saved the same ones under several names.

In a model that reads pictures as well, those of language_model.model.layers and of model.layers are in
model.language_model.layers now; an embedding model was saved with bare layers.
"""

import re

HEAD = "lm_head"
_TEXT = re.compile(
    r"^(?:model\.)?(?:(?:language_model|text_model)\.)?(?:model\.)?(?=(?:layers|embed_tokens|norm|lm_head)\.)"
)


def current_name(name: str, backbone: str) -> str | None:
    """Of a module or tensor in a model whose layers are in `backbone`; None: it belongs to no text model."""
    match = _TEXT.match(name)
    if match is None:
        return None
    own = name[match.end() :]
    return own if own.startswith(f"{HEAD}.") else f"{backbone}.{own}"
