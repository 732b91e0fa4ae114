"""OpenAI's Responses, under /v1/responses: another form of chat completions."""

from loraplex_router.api.http.face import Face
from loraplex_router.api.http.openai.responses.routes import router
from loraplex_router.api.http.openai_errors import write_error

FACE = Face(
    prefix="/v1/responses",
    routers=(router,),
    write_error=write_error,
    field_names={
        "chat.messages": "input",
        "prompt": "input",
        "adapter.id": "model",
        "adapter.source": "adapter_source",
        "adapter.token": "api_token",
        "max_completion_tokens": "max_output_tokens",
        "stopping.max_new_tokens": "max_output_tokens",
        "stopping.min_new_tokens": "min_tokens",
        "truncate": "truncation",
    },
    invalid_status=400,
)
