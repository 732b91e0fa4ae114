from collections.abc import AsyncIterator, Iterator

import pytest

from loraplex import AsyncClient, Client
from tests.client.scripted import ScriptedServicer, serving


@pytest.fixture
def servicer() -> ScriptedServicer:
    return ScriptedServicer()


@pytest.fixture
def address(servicer: ScriptedServicer) -> Iterator[str]:
    with serving(servicer) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


@pytest.fixture
async def async_client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address) as client:
        yield client
