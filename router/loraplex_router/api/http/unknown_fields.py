"""Fields of a body that this server does not have: they are ignored, with a warning that names them."""

from collections.abc import Container, Iterable

from pydantic import BaseModel, ConfigDict

from loraplex_protos.errors import quote

HARMLESS = frozenset({"user", "metadata", "client_metadata", "priority", "request_id"})  # they change no answer
MOST_NAMED, MOST_CHARACTERS = 16, 64  # names, and their characters, in a warning


class OpenBody(BaseModel):
    """A body that may have other fields."""

    model_config = ConfigDict(extra="allow")


def unknown_fields(*bodies: BaseModel | None, harmless: Container[str] = HARMLESS) -> tuple[str, ...]:
    """The warning, if there are other fields than `harmless` ones."""
    sent = (item for body in bodies if body for item in (body.model_extra or {}).items())
    return _warning(name for name, value in sent if value is not None and name not in harmless)


def _warning(unknown: Iterable[str]) -> tuple[str, ...]:
    names = [quote(name[:MOST_CHARACTERS]) for name in unknown]
    if not names:
        return ()
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (f"ignored, because it is not a field of this server: {', '.join(names[:MOST_NAMED])}{more}",)
