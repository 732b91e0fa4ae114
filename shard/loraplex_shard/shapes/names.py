"""The current names of a text model's modules in transformers. Its versions have saved the same modules under several
names.

In a model that also reads pictures, language_model.model.layers and model.layers are now model.language_model.layers.
Embedding models were saved with bare layers.
"""

import re

HEAD = "lm_head"
_TEXT = re.compile(
    r"^(?:model\.)?(?:(?:language_model|text_model)\.(?:model\.)?|(?:model\.)?(?=(?:layers|embed_tokens|norm|lm_head)\.))"
)


def current_name(name: str, backbone: str) -> str | None:
    """The current name of a module or tensor in a model whose layers are in `backbone`; None if it is not in the text
    model."""
    match = _TEXT.match(name)
    if match is None:
        return None
    own = name[match.end() :]
    return own if own.startswith(f"{HEAD}.") else f"{backbone}.{own}"
