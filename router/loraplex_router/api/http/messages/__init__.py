"""Anthropic's face: its Messages API under /v1/messages."""

from loraplex_router.api.http.face import Face
from loraplex_router.api.http.messages.errors import write_error
from loraplex_router.api.http.messages.routes import router

FACE = Face(
    prefix="/v1/messages",
    routers=(router,),
    write_error=write_error,
    field_names={
        "chat.messages": "messages",
        "prompt": "messages",
        "adapter.id": "model",
        "stopping.max_new_tokens": "max_tokens",
        "stopping.stop": "stop_sequences",
    },
    invalid_status=400,
)
