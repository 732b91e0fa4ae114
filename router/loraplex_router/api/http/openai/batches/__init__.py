"""OpenAI's files and batches, under /v1/files and /v1/batches."""

from loraplex_router.api.http.openai.batches.routes import router

__all__ = ["router"]
