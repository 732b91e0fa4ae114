"""Fields of a body that this server does not have: they are ignored, with a warning that names them. Those that would
name an adapter are refused: the base model would answer in its place."""

from collections.abc import Container, Iterable

from pydantic import BaseModel, ConfigDict

from loraplex_protos.errors import quote
from loraplex_router.vocabulary.violations import Violations

NAME_ADAPTERS = (  # on routes of other servers, or in another place of the body
    *("adapter", "adapter_id", "adapter_ids", "adapter_name", "adapters", "merged_adapters"),
    *("lora", "lora_adapter", "lora_adapters", "lora_id", "lora_int_id", "lora_name", "lora_path", "lora_request"),
)
HARMLESS = frozenset({"user", "metadata", "client_metadata", "priority", "request_id"})  # they change no answer
MOST_NAMED, MOST_CHARACTERS = 16, 64  # names, and their characters, in a warning


class OpenBody(BaseModel):
    """A body that may have other fields."""

    model_config = ConfigDict(extra="allow")


def unknown_fields(*bodies: BaseModel | None, harmless: Container[str] = HARMLESS) -> tuple[str, ...]:
    """The warning, if there are other fields than `harmless` ones.

    Raises InvalidRequestError for one that would name an adapter.
    """
    found, sent = Violations(), [item for body in bodies if body for item in (body.model_extra or {}).items()]
    for name, value in sent:
        unset = name not in NAME_ADAPTERS or value in (None, "", [], {})
        found.check(unset, name, "does not name an adapter here: use `model` on /v1, `parameters.adapter_id` elsewhere")
    found.raise_any()
    return _warning(
        name for name, value in sent if value is not None and name not in harmless and name not in NAME_ADAPTERS
    )


def _warning(unknown: Iterable[str]) -> tuple[str, ...]:
    names = [quote(name[:MOST_CHARACTERS]) for name in unknown]
    if not names:
        return ()
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (f"ignored, because it is not a field of this server: {', '.join(names[:MOST_NAMED])}{more}",)
