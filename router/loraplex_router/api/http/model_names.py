"""What a request's `model` names: the base model, or an adapter."""

import re
from collections.abc import Sequence

from loraplex_protos.errors import AdapterNotFoundError, quote
from loraplex_router.vocabulary.adapter import OTHER_BASE_NAMES
from loraplex_router.vocabulary.references import AdapterReference

SERVER_URL = re.compile(r"https?://[^/]+(/v1)?/?")


def read_model_name(model: str, base: Sequence[str]) -> AdapterReference | None:
    """The adapter that `model` names; None is the base, which has the names `base`. The adapter may not exist."""
    if _is_base(model, base):
        return None
    prefix = next((f"{name}:" for name in base if model.startswith(f"{name}:")), "")
    name = model.removeprefix(prefix)
    if not name:
        raise AdapterNotFoundError(f"the model {quote(model)} does not exist")
    return AdapterReference(name)


def answered_name(model: str, base: Sequence[str]) -> str:
    """The `model` of an answer, for the request's."""
    return base[0] if _is_base(model, base) else model


def _is_base(model: str, base: Sequence[str]) -> bool:
    """Hugging Face's clients may send the server's URL."""
    return not model or model in (*base, *OTHER_BASE_NAMES) or SERVER_URL.fullmatch(model) is not None
