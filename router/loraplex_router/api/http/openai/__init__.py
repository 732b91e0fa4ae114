"""OpenAI's face under /v1, with the fields that vLLM's clients add."""
