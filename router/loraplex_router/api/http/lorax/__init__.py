"""LoRAX's face: the routes and shapes that `lorax-client` and `text-generation` rely on."""

from loraplex_router.api.http.errors import write_lorax_error
from loraplex_router.api.http.face import Face
from loraplex_router.api.http.lorax import classifying, operation, routes, tokenizing

FACE = Face(
    prefix="",
    routers=(routes.router, operation.router, tokenizing.router, classifying.router),
    write_error=write_lorax_error,
    field_names={
        "prompt": "inputs",
        "chat.messages": "messages",
        "n": "best_of",
        "adapter.id": "adapter_id",
        "adapter.source": "adapter_source",
        "adapter.token": "api_token",
        "merged_adapters.adapters": "ids",
        "merged_adapters.adapters[].id": "ids[]",
        "merged_adapters.adapters[].source": "adapter_source",
        "merged_adapters.adapters[].token": "api_token",
        "merged_adapters.strategy": "merge_strategy",
        "detail.top_logprobs": "return_k_alternatives",
    },
)
