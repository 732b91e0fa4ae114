"""Who may do what, and how much of it. Pure policy: no clock, no files, no transport.

A key identifies a tenant; a tenant may have several, so that one can be replaced while the other is in use. Only their
hashes are stored. A key identifies the caller of this server; an adapter's token identifies the caller to its source.
"""

import hashlib
import hmac
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from loraplex_protos.adapter_names import normal
from loraplex_protos.errors import ForbiddenError, RateLimitedError, UnauthenticatedError, quote
from loraplex_router.vocabulary.references import AdapterReference, MergedReference, parts_of

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

BUSY_SECONDS = 1.0  # when to try again if a tenant's requests are all running: nobody knows when one ends, so soon


class Allowance(BaseModel):
    """What a tenant may do. Absent fields set no limit."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    adapters: list[str] | None = None  # shell patterns, but * also matches /; the base model is open to all
    max_requests: Annotated[int, Field(ge=1)] | None = None  # running or waiting at the same time
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None  # of prompts and answers
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0  # of its share where others wait, too
    admin: bool = False  # may load and unload adapters, and cancel others' requests


class TenantSettings(Allowance):
    """A tenant as the key file describes it."""

    keys: Annotated[list[Sha256], Field(min_length=1)]  # sha256 of each key, in hex


class Tenant:
    """A tenant and what it has in use.

    Tokens are counted when a request ends, in a token bucket of one minute's tokens. A request may start while the
    bucket is not empty, and may leave it in debt, which delays later ones.
    """

    def __init__(self, name: str, allowance: Allowance) -> None:
        self.name = name
        self.admin, self.weight = allowance.admin, allowance.weight
        self._allowance = allowance
        self._requests = 0
        self._bucket = float(allowance.tokens_per_minute or 0)
        self._filled_at = 0.0

    def update(self, allowance: Allowance) -> None:
        """Changes what the tenant may do. Its current usage stays counted."""
        self.admin, self.weight = allowance.admin, allowance.weight
        self._allowance = allowance

    def may_use(self, adapter_id: str) -> bool:
        patterns = self._allowance.adapters
        return patterns is None or any(fnmatchcase(adapter_id, normal(pattern)) for pattern in patterns)

    def check_adapter(self, adapter: AdapterReference | MergedReference | None) -> None:
        """Raises ForbiddenError if this tenant may not use the adapter, or one of those to be merged."""
        for reference in parts_of(adapter):
            if not self.may_use(reference.id):
                raise ForbiddenError(f"this API key does not allow adapter {quote(reference.id)}")

    def begin(self, now: float) -> None:
        """Starts a request at time `now`, in seconds. Raises RateLimitedError if a limit is reached."""
        limit = self._allowance.max_requests
        if limit is not None and self._requests >= limit:
            raise RateLimitedError(f"this API key allows {limit} requests at once", BUSY_SECONDS)
        if rate := self._allowance.tokens_per_minute:
            self._fill(rate, now)
            if self._bucket < 1:
                wait = (1 - self._bucket) * 60 / rate
                raise RateLimitedError(f"this API key allows {rate} tokens a minute: try again in {wait:.1f} s", wait)
        self._requests += 1

    def end(self, tokens: int, now: float) -> None:
        """Ends a started request; `tokens` counts prompt and answer."""
        self._requests -= 1
        if rate := self._allowance.tokens_per_minute:
            self._fill(rate, now)
            self._bucket -= tokens

    def _fill(self, rate: int, now: float) -> None:
        self._bucket = min(float(rate), self._bucket + (now - self._filled_at) * rate / 60)
        self._filled_at = now


class Keys:
    """The tenants by their keys. Without any tenants, everyone may do everything."""

    def __init__(self, tenants: Mapping[str, TenantSettings]) -> None:
        self._tenants: dict[str, Tenant] = {}
        self._everyone = None if tenants else Tenant("", Allowance(admin=True))
        self.update(tenants)

    def update(self, tenants: Mapping[str, TenantSettings]) -> None:
        """Replaces the tenants and keys. A tenant that stays keeps its current usage."""
        former, self._tenants, self._by_hash = self._tenants, {}, list[tuple[bytes, Tenant]]()
        for name, settings in tenants.items():
            tenant = self._tenants[name] = former.get(name) or Tenant(name, settings)
            tenant.update(settings)
            self._by_hash += [(bytes.fromhex(hashed), tenant) for hashed in settings.keys]

    @property
    def required(self) -> bool:
        """Whether callers need a key. If not, an Authorization header holds something else."""
        return self._everyone is None

    def tenant(self, key: str | None) -> Tenant:
        """The key's tenant. Raises UnauthenticatedError if the key is missing or unknown.

        Takes the same time for every key.
        """
        if self._everyone is not None:
            return self._everyone
        if not key:
            raise UnauthenticatedError("an API key is required: send it as `Authorization: Bearer KEY`")
        hashed = hashlib.sha256(key.encode()).digest()
        found = [tenant for known, tenant in self._by_hash if hmac.compare_digest(known, hashed)]
        if not found:
            raise UnauthenticatedError("unknown API key")
        return found[0]

    def administrator(self, key: str | None) -> Tenant:
        """Like `tenant`, but raises ForbiddenError if the tenant is not an administrator."""
        tenant = self.tenant(key)
        if not tenant.admin:
            raise ForbiddenError("this needs an administrator's API key")
        return tenant


def read_bearer(authorization: str | None) -> str | None:
    """The key, or token, in an Authorization header; None if there is none."""
    scheme, _, value = (authorization or "").partition(" ")
    return value.strip() or None if scheme.lower() == "bearer" else None
