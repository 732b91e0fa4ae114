"""What a router has left that has died: what it said of what runs, and what its journal has."""

import time

import orjson

from loraplex_router.engine.generation import Generation
from loraplex_router.journal.records import read_progress
from loraplex_router.usage.event import LOST, UsageEvent, Used, event_of, used_by
from loraplex_router.usage.ledger import Entry, Lost


def encode(generation: Generation) -> bytes:
    """A generation that runs here."""
    return orjson.dumps([event_of(generation, LOST, time.monotonic()), used_by(generation)])


def read(lost: Lost, number: int) -> tuple[UsageEvent, Entry]:
    """As an entry with this number. Raises ValueError, KeyError or TypeError if `lost` is not complete."""
    if lost.stream:
        record, generated = read_progress(lost.data)
        event = UsageEvent(
            time.time(), record.request_id, record.tenant, record.adapter, record.digest, record.version, LOST
        )
        account, used = record.nonce, Used(1, len(record.prompt), 0, generated)
    else:
        said, numbers = orjson.loads(lost.data)
        account, event, used = lost.account, UsageEvent(**said), Used(**numbers)
    return event, Entry(number, account, event.tenant, event.adapter, used, lost.stream, lost.router)
