"""Reads the key file (YAML or JSON) of --api-keys, and rereads it when it changes.

tenants:
  acme:
    keys: [5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8]  # printf %s KEY | sha256sum
    adapters: ["acme/*", sql]
    max_requests: 8
    max_adapters: 4
    requests_per_minute: 600
    tokens_per_minute: 60000
    kv_share: 0.5
  operator:
    keys: [...]
    admin: true
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Annotated

import orjson
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from loraplex_protos.errors import LoraplexError
from loraplex_router.access.followed_file import FollowedFile
from loraplex_router.access.keys import Keys, TenantSettings
from loraplex_router.access.read_beside import read_beside, write_answer
from loraplex_router.access.strict_yaml import BadValueError, DuplicateKeyError, describe, read_yaml

logger = logging.getLogger(__name__)

MAX_NAME = 128  # characters of a tenant's name
FAULTS = {
    DuplicateKeyError: "repeats a name in the mapping that begins",
    BadValueError: "has an impossible value, such as a date that does not exist,",
}


class KeyFileError(LoraplexError):
    """The key file cannot be used. The message says where the fault is, and shows nothing that may be a key."""


def _check_name(name: str) -> str:
    """Where tenants are shown, no name stands for everyone on a server without keys, and one in brackets for several:
    neither may be a tenant's own. Lines of logs and labels of metrics have the name as it is."""
    if not name.strip() or name != name.strip() or not name.isprintable() or "[" in name or len(name) > MAX_NAME:
        rule = f"1 to {MAX_NAME} printable characters other than [, without a space at the beginning or end"
        raise PydanticCustomError("tenant_name", "a tenant's name has {rule}", {"rule": rule})
    return name


TenantName = Annotated[str, AfterValidator(_check_name)]


class _KeyFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    tenants: Annotated[dict[TenantName, TenantSettings], Field(min_length=1)]


class KeyFile:
    """The current keys in a file. Raises KeyFileError if the file is invalid at the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = FollowedFile(path)
        self.keys = Keys(read_tenants(path))

    async def follow(self) -> None:
        """Checks the file periodically, until cancelled. Keeps the old keys while the file is invalid."""
        async for _ in self._file.changes():
            await self._reload()

    async def _reload(self) -> None:
        try:
            self.keys.update(await self._file.run(read_tenants_beside, self._path))
        except KeyFileError as error:
            logger.error("keeping the previous API keys: %s", error)
        else:
            logger.info("reloaded the API keys")


def read_tenants(path: Path) -> dict[str, TenantSettings]:
    """Raises KeyFileError."""
    try:
        content = read_yaml(path.read_bytes())
        file = _KeyFile.model_validate(content)
    except OSError as error:
        raise KeyFileError(f"--api-keys: {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise KeyFileError(f"--api-keys: {path}: {describe(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        wrong = next((said for kind, said in FAULTS.items() if isinstance(error, kind)), "is neither YAML nor JSON")
        raise KeyFileError(f"--api-keys: {path} {wrong}{place}") from None
    counts = Counter(hashed for tenant in file.tenants.values() for hashed in tenant.keys)
    if counts.total() != len(counts):
        raise KeyFileError(f"--api-keys: {path}: a key is listed twice")
    return file.tenants


def read_tenants_beside(path: Path) -> dict[str, TenantSettings]:
    """As read_tenants. Blocks, but hardly holds the interpreter's lock."""
    return read_beside(path, read_tenants, __name__, _decode, KeyFileError)


def _encode(tenants: dict[str, TenantSettings]) -> bytes:
    return b"\n".join(orjson.dumps((name, settings.model_dump())) for name, settings in tenants.items())


def _decode(data: bytes) -> dict[str, TenantSettings]:
    """Tenant by tenant, so that other threads may run."""
    return {name: TenantSettings(**settings) for name, settings in map(orjson.loads, data.splitlines())}


if __name__ == "__main__":
    write_answer(lambda path: _encode(read_tenants(path)))
