"""OpenAI's face under /v1, with the fields that vLLM's clients add."""

from loraplex_router.api.http.face import Face
from loraplex_router.api.http.openai import batches, embeddings, models, responses, routes
from loraplex_router.api.http.openai_errors import write_error

FACE = Face(
    prefix="/v1",
    routers=(routes.router, models.router, embeddings.router, batches.router),
    write_error=write_error,
    field_names={
        "chat.messages": "messages",
        "adapter.id": "model",
        "adapter.source": "adapter_source",
        "adapter.token": "api_token",
        "lora_path.id": "lora_path",
        "lora_path.source": "adapter_source",
        "lora_path.token": "api_token",
        "adapters[].id": "adapters[]",
        "adapters[].source": "adapter_source",
        "adapters[].token": "api_token",
        "inputs": "input",
        "detail.prompt_top_logprobs": "prompt_logprobs",
        "stopping.max_new_tokens": "max_tokens",
        "stopping.min_new_tokens": "min_tokens",
        "token_ids": "prompt",
        "truncate": "truncate_prompt_tokens",
    },
    invalid_status=400,
)

FACES = (FACE, responses.FACE)
