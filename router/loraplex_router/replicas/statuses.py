"""What a listing says of an adapter: AdapterStatus, as generation.proto has it."""

from collections.abc import Sequence

from loraplex_protos import generation_pb2 as pb
from loraplex_router.adapters.registry import Entry
from loraplex_router.vocabulary.adapter import Adapter, LocalAdapter
from loraplex_router.vocabulary.references import AdapterReference


def status_in_memory(entry: Entry, holders: Sequence[tuple[str, Adapter]], leaving: bool) -> pb.AdapterStatus:
    """Of one that replicas hold: their names, and what it is to each. `leaving`: its name is to be forgotten."""
    adapters = [adapter for _, adapter in holders]
    leaving = leaving or all(adapter.leaving for adapter in adapters)
    return pb.AdapterStatus(
        id=entry.id,
        source=entry.source,
        revision=entry.revision,
        digest=entry.digest,
        state=pb.ADAPTER_STATE_UNLOADING if leaving else pb.ADAPTER_STATE_LOADED,
        tier=max(map(_tier, adapters)),
        lora_rank=max(adapter.lora_rank for adapter in adapters),
        size_bytes=max(adapter.size_bytes for adapter in adapters),
        requests=sum(adapter.requests for adapter in adapters),
        running_sequences=sum(adapter.running for adapter in adapters),
        waiting_sequences=sum(adapter.waiting for adapter in adapters),
        last_used=max(adapter.last_used for adapter in adapters) or None,
        pinned=any(adapter.pinned for adapter in adapters),
        warnings=adapters[0].warnings,
        invocation_token_ids=_activating(adapters[0]),
        classifier=adapters[0].classifier,
        residences=[
            pb.AdapterResidence(
                replica=replica,
                tier=_tier(adapter),
                running_sequences=adapter.running,
                waiting_sequences=adapter.waiting,
                pinned=adapter.pinned,
            )
            for replica, adapter in holders
        ],
    )


def status_while_fetched(reference: AdapterReference) -> pb.AdapterStatus:
    """Of one that is on its way into host memory."""
    state = pb.ADAPTER_STATE_FETCHING
    return pb.AdapterStatus(id=reference.id, source=reference.source, revision=reference.revision, state=state)


def status_on_disk(adapter: LocalAdapter) -> pb.AdapterStatus:
    """Of one that lies in the adapter directory, and is not loaded."""
    return pb.AdapterStatus(
        id=adapter.id,
        source="local",
        state=pb.ADAPTER_STATE_BROKEN if adapter.fault else pb.ADAPTER_STATE_AVAILABLE,
        tier=pb.ADAPTER_TIER_DISK,
        warnings=adapter.warnings,
        invocation_token_ids=_activating(adapter),
        reason=adapter.fault or None,
    )


def _tier(adapter: Adapter) -> pb.AdapterTier.ValueType:
    return pb.ADAPTER_TIER_DEVICE if adapter.ready else pb.ADAPTER_TIER_HOST


def _activating(adapter: Adapter | LocalAdapter) -> tuple[int, ...]:
    return adapter.invocation.token_ids if adapter.invocation is not None else ()
