"""Who is calling. Pure policy: no clock, no files, no transport.

A key identifies a tenant; a tenant may have several, so that one can be replaced while the other is in use. Only their
hashes are stored. A key identifies the caller of this server; an adapter's token identifies the caller to its source.
"""

import hashlib
import secrets
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from loraplex_protos.errors import ForbiddenError, UnauthenticatedError
from loraplex_router.access.tenant import Allowance, Tenant

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TenantSettings(Allowance):
    """A tenant as the key file describes it."""

    keys: Annotated[list[Sha256], Field(min_length=1)]  # sha256 of each key, in hex


class Keys:
    """The tenants by their keys. Without any tenants, everyone may do everything."""

    def __init__(self, tenants: Mapping[str, TenantSettings]) -> None:
        self._tenants: dict[str, Tenant] = {}
        self._everyone = None if tenants else Tenant("", Allowance(admin=True))
        self._own: dict[str, str] = {}  # keys that this process made, by tenant
        self._owners: dict[str, str] = {}  # the tenants of these keys, by their hashes
        self.update(tenants)

    def update(self, tenants: Mapping[str, TenantSettings]) -> None:
        """Replaces the tenants and keys. A tenant that stays keeps its current usage."""
        former, self._tenants, self._by_hash = self._tenants, {}, dict[str, Tenant]()
        for name, settings in tenants.items():
            tenant = self._tenants[name] = former.get(name) or Tenant(name, settings)
            tenant.update(settings)
            self._by_hash |= dict.fromkeys(settings.keys, tenant)

    @property
    def required(self) -> bool:
        """Whether callers need a key. If not, an Authorization header holds something else."""
        return self._everyone is None

    def tenant(self, key: str | None) -> Tenant:
        """The key's tenant. Raises UnauthenticatedError if the key is missing or unknown."""
        if self._everyone is not None:
            return self._everyone
        if not key:
            raise UnauthenticatedError("an API key is required: send it as `Authorization: Bearer KEY`")
        # The time that this takes tells nothing about the known keys: a dict compares texts only if its own hashes of
        # them are equal, which nobody outside knows. And even who knew a key's SHA-256 would not know the key.
        hashed = _hash(key)
        found = self._by_hash.get(hashed)
        if found is None and (owner := self._owners.get(hashed)) is not None:
            found = self._tenants.get(owner)
        if found is None:
            raise UnauthenticatedError("unknown API key")
        return found

    def key_for(self, tenant: str) -> str | None:
        """A key with which this process makes requests for the tenant, as long as there is this tenant. None if nobody
        needs one."""
        if self.required and tenant not in self._own:
            key = self._own[tenant] = secrets.token_urlsafe(32)
            self._owners[_hash(key)] = tenant
        return self._own.get(tenant)

    def administrator(self, key: str | None) -> Tenant:
        """Like `tenant`, but raises ForbiddenError if the tenant is not an administrator."""
        tenant = self.tenant(key)
        if not tenant.admin:
            raise ForbiddenError("this needs an administrator's API key")
        return tenant


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_bearer(authorization: str | None) -> str | None:
    """The key, or token, in an Authorization header; None if there is none."""
    scheme, _, value = (authorization or "").partition(" ")
    return value.strip() or None if scheme.lower() == "bearer" else None
