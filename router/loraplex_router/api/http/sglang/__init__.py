"""SGLang's face: it loads and unloads adapters. Its other routes are OpenAI's, or have other paths here."""

from loraplex_router.api.http.face import Face
from loraplex_router.api.http.sglang.routes import loading, unloading, write_error

FACES = (
    Face("/load_lora_adapter", (loading,), write_error, invalid_status=400),
    Face("/unload_lora_adapter", (unloading,), write_error, invalid_status=400),
)
