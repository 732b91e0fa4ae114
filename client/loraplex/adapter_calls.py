"""Calls about adapters: what the server has, what it should load, and under which names."""

from collections.abc import Mapping

from loraplex import requests, responses
from loraplex.connection import Connection
from loraplex.options import AdapterReference
from loraplex.types import Adapter
from loraplex_protos import generation_pb2 as pb


class AdapterCalls(Connection):
    async def adapters(self, *, timeout: float | None = None) -> tuple[Adapter, ...]:
        """The loaded adapters, and those in the server's adapter directory, sorted by id. `timeout` is for each
        thousand of them."""
        request, found = pb.ListAdaptersRequest(page_size=requests.ADAPTERS_AT_A_TIME), list[Adapter]()
        while True:
            page = await self._send(self._stub.ListAdapters, request, timeout)
            found += map(responses.adapter, page.adapters)
            if not page.next_page_token:
                return tuple(found)
            request.page_token = page.next_page_token

    async def load_adapter(
        self, id: str, *, source: str = "", revision: str = "", token: str = "", timeout: float | None = None
    ) -> Adapter:
        """Fetches and checks an adapter before its first request needs it. For the arguments see `AdapterReference`.

        Loading an adapter again rereads its source: if the content changed, later requests use the new content. Raises
        AdapterNotFoundError, AdapterForbiddenError, AdapterInvalidError or AdapterSourceError.
        """
        reference = requests.adapter_reference(AdapterReference(id, source, revision, token))
        response = await self._send_once(self._stub.LoadAdapter, pb.LoadAdapterRequest(adapter=reference), timeout)
        return responses.adapter(response.adapter)

    async def upload_adapter(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Uploads an adapter's files, by name: adapter_config.json, adapter_model.safetensors, and what belongs to it.
        They are the newest version of the name; sequences that run keep the version before. The server keeps them
        beside its registry file, or in memory if it cannot write one.

        Raises AdapterInvalidError, or AdapterConflictError if the name has not `expected_version` (0: none).
        """
        parts = requests.upload_parts(name, files, expected_version)
        response = await self._send_once(self._stub.UploadAdapter, parts, timeout)
        return responses.adapter(response.adapter)

    async def register_adapter(
        self,
        name: str,
        id: str,
        *,
        source: str = "",
        revision: str = "",
        token: str = "",
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Makes an adapter the newest version of a name in the server's registry file, with its source, commit and
        content as they are now. The token is not kept.

        Raises AdapterConflictError if the name has not `expected_version` (0: none), ForbiddenError if the file cannot
        be written.
        """
        reference = requests.adapter_reference(AdapterReference(id, source, revision, token))
        request = pb.RegisterAdapterRequest(name=name, adapter=reference, expected_version=expected_version)
        response = await self._send_once(self._stub.RegisterAdapter, request, timeout)
        return responses.adapter(response.adapter)

    async def set_alias(
        self,
        name: str,
        targets: Mapping[str, float],
        *,
        expected: Mapping[str, float] | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Makes a name in the server's registry file stand for other names or versions, with shares that are together
        100 per cent. Raises AdapterConflictError if it does not stand for `expected` (empty: nothing)."""
        request = requests.alias_request(name, targets, expected)
        response = await self._send_once(self._stub.SetAlias, request, timeout)
        return responses.adapter(response.adapter)

    async def remove_adapter(
        self, name: str, *, expected_version: int | None = None, timeout: float | None = None
    ) -> None:
        """Removes an uploaded adapter's name, or from the registry file a name, an alias, or a version (name@version)
        other than the newest. Sequences that use it run to their end."""
        request = pb.RemoveAdapterRequest(name=name, expected_version=expected_version)
        await self._send_once(self._stub.RemoveAdapter, request, timeout)

    async def unload_adapter(
        self,
        id: str = "",
        *,
        source: str = "",
        revision: str = "",
        digest: str = "",
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Frees an adapter's memory on the device and on the host. Give its id or its digest; merged adapters only have
        a digest.

        With `wait`, waits until the sequences that need it have ended; otherwise raises AdapterInUseError if there are
        any.
        """
        request = pb.UnloadAdapterRequest(wait=wait)
        requests.name_adapter(request, AdapterReference(id, source, revision), digest)
        await self._send_once(self._stub.UnloadAdapter, request, timeout)

    async def pin_adapter(
        self,
        id: str = "",
        *,
        source: str = "",
        revision: str = "",
        token: str = "",
        digest: str = "",
        timeout: float | None = None,
    ) -> Adapter:
        """Loads an adapter onto one replica's device, where it stays until it is unpinned or unloaded. Returns once it
        is there. A pin by `digest` needs a loaded adapter, and is lost with its replica.

        Raises AdapterPinsError if no slot would be left for other adapters, and the errors of `load_adapter`.
        """
        reference = AdapterReference(id, source, revision, token)
        request = requests.name_adapter(pb.PinAdapterRequest(), reference, digest)
        response = await self._send_once(self._stub.PinAdapter, request, timeout)
        return responses.adapter(response.adapter)

    async def unpin_adapter(
        self,
        id: str = "",
        *,
        source: str = "",
        revision: str = "",
        digest: str = "",
        timeout: float | None = None,
    ) -> Adapter:
        """Lets an adapter leave the device when others need its slot."""
        request = requests.name_adapter(pb.UnpinAdapterRequest(), AdapterReference(id, source, revision), digest)
        response = await self._send_once(self._stub.UnpinAdapter, request, timeout)
        return responses.adapter(response.adapter)
