"""What a listing says of an adapter: AdapterStatus, as generation.proto has it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loraplex_protos import generation_pb2 as pb
from loraplex_router.adapters.resolutions import Entry
from loraplex_router.replicas.prefetching import Prefetched
from loraplex_router.replicas.replica import Replica
from loraplex_router.vocabulary.adapter import Adapter, Fetch, LocalAdapter
from loraplex_router.vocabulary.references import AdapterReference, Upload, ids_of


class Holder(NamedTuple):
    """A replica that has an adapter in memory, and what the adapter does there under one of its names."""

    replica: str
    adapter: Adapter
    pinned: bool
    requests: int
    running: int  # sequences
    waiting: int


def hold(replica: Replica, adapter: Adapter, name: str | None, pinned: bool) -> Holder:
    """`name`: only the requests that have this name for it count; None: all of them."""
    pinned = pinned and adapter.pinned
    if name is None:
        return Holder(replica.name, adapter, pinned, adapter.requests, adapter.running, adapter.waiting)
    own = [
        each
        for each in replica.engine.generations
        if each.adapter is adapter and ",".join(ids_of(each.reference)) == name
    ]
    sequences = [output.sequence for generation in own for output in generation.unfinished]
    running = sum(sequence.row is not None for sequence in sequences)
    return Holder(replica.name, adapter, pinned, len(own), running, len(sequences) - running)


def status_in_memory(entry: Entry, holders: Sequence[Holder], leaving: bool) -> pb.AdapterStatus:
    """Of one that replicas hold. `leaving`: its name is to be forgotten."""
    adapters = [holder.adapter for holder in holders]
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
        requests=sum(holder.requests for holder in holders),
        running_sequences=sum(holder.running for holder in holders),
        waiting_sequences=sum(holder.waiting for holder in holders),
        last_used=max(adapter.last_used for adapter in adapters) or None,
        pinned=any(holder.pinned for holder in holders),
        warnings=adapters[0].warnings,
        invocation_token_ids=_activating(adapters[0]),
        classifier=adapters[0].classifier,
        residences=[
            pb.AdapterResidence(
                replica=holder.replica,
                tier=_tier(holder.adapter),
                running_sequences=holder.running,
                waiting_sequences=holder.waiting,
                pinned=holder.pinned,
            )
            for holder in holders
        ],
    )


def status_while_fetched(reference: AdapterReference, fetch: Fetch | None) -> pb.AdapterStatus:
    """Of one that is on its way to disk or into host memory. `fetch`: how far its files are, if they are under way."""
    return pb.AdapterStatus(
        id=reference.id,
        source=reference.origin.source,
        revision=reference.origin.revision,
        state=pb.ADAPTER_STATE_FETCHING,
        reason=fetch.trouble or None if fetch else None,
        fetched_bytes=fetch.done if fetch else None,
        total_bytes=fetch.total or None if fetch else None,
    )


def status_registered(version: AdapterReference, prefetched: Sequence[Prefetched]) -> pb.AdapterStatus:
    """Of a version in the registry, or an upload, that is not loaded."""
    if isinstance(version.origin, Upload):
        return _version(version, pb.ADAPTER_STATE_AVAILABLE)
    assert version.version is not None
    failed = version.version.fault or next((each.reason for each in prefetched if each.reason), "")
    status = _version(version, pb.ADAPTER_STATE_REGISTERED)
    if failed:
        status.state, status.reason = pb.ADAPTER_STATE_FAILED, failed
    elif prefetched and all(each.fetched_bytes is not None for each in prefetched):
        status.state, status.tier = pb.ADAPTER_STATE_AVAILABLE, pb.ADAPTER_TIER_DISK
    return status


def status_in_directory(version: AdapterReference, adapter: LocalAdapter) -> pb.AdapterStatus:
    """Of a version in the registry that lies in the adapter directory, and is not loaded."""
    status = status_on_disk(adapter, hidden=False)
    status.MergeFrom(_version(version, pb.ADAPTER_STATE_FAILED if adapter.fault else pb.ADAPTER_STATE_AVAILABLE))
    return status


def _version(version: AdapterReference, state: pb.AdapterState.ValueType) -> pb.AdapterStatus:
    assert version.version is not None
    return pb.AdapterStatus(
        id=version.id,
        source=version.origin.source,
        revision=version.origin.revision,
        digest=version.version.digest or None,
        state=state,
    )


def status_of_alias(name: str, targets: Mapping[str, float]) -> pb.AdapterStatus:
    """Of an alias, or of a registered name, which stands for its newest version."""
    parts = [pb.AliasTarget(adapter=target, percent=percent) for target, percent in targets.items()]
    return pb.AdapterStatus(id=name, state=pb.ADAPTER_STATE_ALIAS, targets=parts)


def status_on_disk(adapter: LocalAdapter, hidden: bool) -> pb.AdapterStatus:
    """Of one that lies in the adapter directory, and is not loaded. `hidden`: the registry has its name, too."""
    hiding = ("the registry has this name: request this one with the source local",) if hidden else ()
    return pb.AdapterStatus(
        id=adapter.id,
        source="local",
        state=pb.ADAPTER_STATE_BROKEN if adapter.fault else pb.ADAPTER_STATE_AVAILABLE,
        tier=pb.ADAPTER_TIER_DISK,
        warnings=(*hiding, *adapter.warnings),
        invocation_token_ids=_activating(adapter),
        reason=adapter.fault or None,
    )


def _tier(adapter: Adapter) -> pb.AdapterTier.ValueType:
    return pb.ADAPTER_TIER_DEVICE if adapter.ready else pb.ADAPTER_TIER_HOST


def _activating(adapter: Adapter | LocalAdapter) -> tuple[int, ...]:
    return adapter.invocation.token_ids if adapter.invocation is not None else ()
