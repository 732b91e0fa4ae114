"""What is stored about a generation, in bytes: a line of JSON, then its tokens as they come.

Each group of tokens says where it begins: a group that is written twice, or that arrives after a longer one with the
same tokens since the store hung, is read as one.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Self

import orjson

from loraplex_router.vocabulary.position import Reached
from loraplex_router.vocabulary.request import Request

MAX_SEQUENCES = 64  # of a stream: each has a part in the events' ids


@dataclass(frozen=True, slots=True)
class Record:
    """What another router must know to continue a generation, apart from its request, which the client sends again."""

    fingerprint: str  # of the request
    tenant: str
    request_id: str
    adapters: tuple[str, ...]  # the ids that the names in the request stood for
    adapter: str  # its name, as its usage is counted
    version: str  # of the adapter registry
    digest: str  # the adapter's
    prompt: tuple[int, ...]
    seed: int  # of the first sequence
    nonce: str  # as in a Generation

    def encode(self) -> bytes:
        fields = {name: getattr(self, name) for name in self.__slots__}  # asdict copies every token of the prompt
        return orjson.dumps(fields) + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Self:
        """Raises ValueError or TypeError if it is not a record."""
        fields = orjson.loads(line)
        return cls(**{**fields, "adapters": tuple(fields["adapters"]), "prompt": tuple(fields["prompt"])})


@dataclass(frozen=True, slots=True)
class Saved:
    """A generation to be continued."""

    record: Record
    tokens: tuple[list[int], ...]  # generated so far, of each sequence
    reached: tuple[Reached, ...]  # where its client is; tokens up to there may be missing above


def encode_tokens(sequence: int, start: int, tokens: Sequence[int]) -> bytes:
    """A group of tokens, of the generation's sequence with this index, from the position `start` of the answer on."""
    return array("I", (sequence, start, len(tokens), *tokens)).tobytes()


def decode(data: bytes, sequences: int) -> tuple[Record, tuple[list[int], ...]]:
    """The record and each sequence's tokens. Raises ValueError, KeyError or TypeError if something is missing."""
    line, _, packed = data.partition(b"\n")
    record, words = Record.decode(line), array("I", packed)
    tokens: tuple[list[int], ...] = tuple([] for _ in range(sequences))
    at = 0
    while at < len(words):
        sequence, start, count = words[at : at + 3]
        of = tokens[sequence]
        if start > len(of):
            raise ValueError("tokens are missing")
        of[start : start + count] = words[at + 3 : at + 3 + count]
        at += 3 + count
    return record, tokens


def read_progress(data: bytes) -> tuple[Record, int]:
    """The record, and how many tokens there are of all sequences. Raises ValueError, KeyError or TypeError if it is not
    complete."""
    record, tokens = decode(data, MAX_SEQUENCES)
    return record, sum(map(len, tokens))


def fingerprint(request: Request, model: str) -> str:
    """The same for the same request to the same model, whichever call it comes with."""
    bias = sorted((request.sampling.logit_bias or {}).items())
    sampling = request.sampling.model_copy(update={"logit_bias": bias})
    plain = replace(request, request_id="", session="", deadline=None, open_parameters=frozenset(), sampling=sampling)
    return sha256(repr((model, sorted(request.open_parameters), plain)).encode(errors="backslashreplace")).hexdigest()
