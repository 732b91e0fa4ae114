"""How many tokens each tenant has used, with which adapters, since the router started."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from loraplex_router.engine.output import Generation
from loraplex_router.telemetry.labels import OTHER

MOST_ADAPTERS = 1000  # of a tenant that are counted by name; the others share one entry


@dataclass(slots=True)
class Used:
    """What ended requests took, those that were cancelled included. Those that never ran took nothing."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, found in the prefix cache
    generated_tokens: int = 0


class Usage:
    def __init__(self) -> None:
        self.since = time.time()
        self._used: dict[str, dict[str, Used]] = {}  # by tenant, by adapter

    def add(self, generation: Generation) -> None:
        """Counts a generation that has ended."""
        if generation.started is None:
            return
        of_tenant = self._used.setdefault(generation.tenant, {})
        name = generation.adapter_name
        if name not in of_tenant and len(of_tenant) >= MOST_ADAPTERS:
            name = OTHER
        used = of_tenant.setdefault(name, Used())
        used.requests += 1
        used.prompt_tokens += generation.num_prompt
        used.cached_tokens += generation.outputs[0].sequence.prefix_hit
        used.generated_tokens += generation.num_generated

    def of(self, tenant: str | None) -> Iterator[tuple[str, str, Used]]:
        """A tenant and an adapter at a time, sorted by name; those of one tenant, or of all."""
        for name in sorted(self._used) if tenant is None else (tenant,):
            for adapter, used in sorted(self._used.get(name, {}).items()):
                yield name, adapter, used
