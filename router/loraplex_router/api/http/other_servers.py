"""Paths of other servers, and what to call here instead."""

CHAT = "POST /v1/chat/completions, with the adapter as `model`"
TEXT = "POST /v1/completions, with the adapter as `model`"
EMBED = "POST /v1/embeddings"
LIST = "GET /v1/models or GET /adapters"
MANAGED = "the server's operator: `loraplex serve MODEL` has one base model, and adapters beside it"

PATHS = {
    "llama.cpp": {
        "/lora-adapters": "GET /adapters, and scales are not set for everybody: each request names its adapter, as "
        "`model` on /v1, or several with weights as `merged_adapters` in the parameters of POST /generate",
        **dict.fromkeys(("/completion", "/completions", "/infill"), TEXT),
        "/chat/completions": CHAT,
        **dict.fromkeys(("/embedding", "/embeddings"), EMBED),
        "/apply-template": "POST /tokenize, with `messages`",
        **dict.fromkeys(("/props", "/models"), "GET /info or GET /v1/models"),
        "/slots": "GET /metrics",
    },
    "Ollama": {
        "/api/chat": CHAT,
        "/api/generate": TEXT,
        **dict.fromkeys(("/api/embed", "/api/embeddings"), EMBED),
        **dict.fromkeys(("/api/tags", "/api/ps"), LIST),
        "/api/show": "GET /info or GET /adapters",
        "/api/version": "GET /version",
        **dict.fromkeys(("/api/pull", "/api/create", "/api/copy", "/api/delete", "/api/push"), MANAGED),
    },
    "SGLang": {
        **dict.fromkeys(("/get_model_info", "/model_info", "/get_server_info", "/server_info"), "GET /info"),
        "/load_lora_adapter_from_tensors": "POST /adapters/upload",
        "/encode": EMBED,
        **dict.fromkeys(("/v1/tokenize", "/v1/detokenize"), "POST /tokenize or POST /detokenize"),
        "/update_weights_from_disk": "POST /adapters/load, which reads an adapter again",
        "/abort_request": "closing the connection of the request",
    },
    "TGI": {"/chat_tokenize": "POST /tokenize, with `messages`"},
    "mistral.rs": {
        "/activate_adapters": "`model` on /v1: each request names its adapter, which is loaded for it",
    },
    "vLLM": {
        "/pooling": EMBED,
        "/inference/v1/generate": TEXT,
    },
}
HINTS = {
    path: f"is a path of {server}; here it is {here}" for server, paths in PATHS.items() for path, here in paths.items()
}
