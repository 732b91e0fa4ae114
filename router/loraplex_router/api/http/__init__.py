"""The HTTP faces: LoRAX's and OpenAI's requests, adapter administration, health and metrics, over the service."""
