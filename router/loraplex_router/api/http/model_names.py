"""What a request's `model` names: the base model, or an adapter."""

from collections.abc import Sequence

from loraplex_protos.errors import AdapterNotFoundError, quote
from loraplex_router.vocabulary.references import AdapterReference

BASE_NAMES = ("", "tgi")  # in addition to the model's own name; `text-generation` sends "tgi"


def read_model_name(model: str, base: Sequence[str]) -> AdapterReference | None:
    """The adapter that `model` names; None is the base, which has the names `base`. The adapter may not exist."""
    if model in base or model in BASE_NAMES:
        return None
    prefix = next((f"{name}:" for name in base if model.startswith(f"{name}:")), "")
    name = model.removeprefix(prefix)
    if not name:
        raise AdapterNotFoundError(f"the model {quote(model)} does not exist")
    return AdapterReference(name)


def answered_name(model: str, base: Sequence[str]) -> str:
    """The `model` of an answer, for the request's."""
    return base[0] if not model or model in base else model
