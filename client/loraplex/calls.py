"""Every call of a client, as coroutines. `AsyncClient` has them as they are, `Client` runs them to their end."""

from loraplex.adapter_calls import AdapterCalls
from loraplex.generation_calls import GenerationCalls


class Calls(GenerationCalls, AdapterCalls):
    """All calls."""
