"""Fields of a body that this server does not have: they are ignored, with a warning that names them. Those that would
name an adapter are refused: the base model would answer in its place."""

from collections.abc import Container, Sequence

from pydantic import BaseModel, ConfigDict

from loraplex_protos.errors import quote
from loraplex_router.vocabulary.violations import Violations

NAME_ADAPTERS = dict.fromkeys(  # on routes of other servers, or in another place of the body
    (
        *("adapter", "adapter_id", "adapter_ids", "adapter_name", "adapters", "merged_adapters"),
        *("lora", "lora_adapter", "lora_adapters", "lora_id", "lora_int_id", "lora_name", "lora_path", "lora_request"),
    )
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
    found, sent = Violations(), [body.model_extra or {} for body in bodies if body]
    for name, value in ((name, fields.get(name)) for fields in sent for name in NAME_ADAPTERS):
        unset = value in (None, "", [], {})
        found.check(unset, name, "does not name an adapter here: use `model` on /v1, `parameters.adapter_id` elsewhere")
    found.raise_any()
    return _warning([name for fields in sent for name, value in fields.items() if value is not None], harmless)


def _warning(names: Sequence[str], harmless: Container[str]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in harmless and name not in NAME_ADAPTERS]
    if not unknown:
        return ()
    shown = ", ".join(quote(name[:MOST_CHARACTERS]) for name in unknown[:MOST_NAMED])  # there may be thousands
    more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
    return (f"ignored, because it is not a field of this server: {shown}{more}",)
