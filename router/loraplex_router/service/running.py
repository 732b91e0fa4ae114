"""The running requests by tenant and id: ids are the clients' own, and those of one tenant mean nothing to another. A
request has one generation, or one for each of its adapters."""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.access.tenant import Tenant, Visit
from loraplex_router.engine.generation import Generation


@dataclass(slots=True)
class RunningRequest:
    visit: Visit
    generations: dict[Generation, int]  # those that are not closed yet, with the tokens of each answer that are spent

    @property
    def tenant(self) -> Tenant:
        return self.visit.tenant


class RunningRequests:
    def __init__(self) -> None:
        self._by_id: dict[tuple[str, str], RunningRequest | None] = {}  # None: not queued yet

    def __iter__(self) -> Iterator[Generation]:
        """All that run now: some may end meanwhile."""
        requests = [request for request in self._by_id.values() if request is not None]
        return iter([generation for request in requests for generation in request.generations])

    def __len__(self) -> int:
        return len(self._by_id)

    def has(self, tenant: str, request_id: str) -> bool:
        return (tenant, request_id) in self._by_id

    def get(self, tenant: str, request_id: str) -> RunningRequest | None:
        """None: the tenant has none, or it is not queued yet."""
        return self._by_id.get((tenant, request_id))

    def get_all(self, request_id: str) -> list[RunningRequest]:
        """Those of all tenants that are queued."""
        return [request for (_, id), request in self._by_id.items() if id == request_id and request is not None]

    def reserve(self, tenant: str, request_id: str) -> str:
        """The id, or a new one if there is none. Raises InvalidRequestError if the tenant uses it."""
        request_id = request_id or secrets.token_hex(8)
        if self.has(tenant, request_id):
            raise InvalidRequestError(FieldViolation("request_id", "a request with this id is already running"))
        self._by_id[tenant, request_id] = None
        return request_id

    def begin(self, request_id: str, visit: Visit, generations: Sequence[Generation]) -> None:
        visit.begin_part()
        self._by_id[visit.tenant.name, request_id] = RunningRequest(visit, dict.fromkeys(generations, 0))

    def forget(self, tenant: str, request_id: str) -> None:
        """It was not queued."""
        del self._by_id[tenant, request_id]

    def spend(self) -> None:
        """Counts the tokens that answers have so far."""
        now = time.monotonic()
        for request in filter(None, self._by_id.values()):
            for generation, spent in request.generations.items():
                request.visit.spend(generation.num_generated - spent, now)
                request.generations[generation] = generation.num_generated

    def end(self, generation: Generation) -> None:
        """Closes one of a request's generations."""
        key = generation.tenant, generation.request_id
        request = self._by_id[key]
        assert request is not None
        spent = request.generations.pop(generation)
        never_ran = generation.started is None  # then its prompt cost nothing
        tokens = -generation.num_prompt if never_ran else generation.num_generated - spent
        request.visit.spend(tokens, time.monotonic())
        if not request.generations:
            del self._by_id[key]
            request.visit.end_part()
