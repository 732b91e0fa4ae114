"""Where replicas are: fixed addresses, and names whose addresses change."""

import pytest
from pydantic import ValidationError

from loraplex_router.settings import RouterSettings
from loraplex_router.wire import discovery
from loraplex_router.wire.discovery import Address, Discovery


async def test_fixed_addresses_are_never_looked_up():
    seen = [found async for found in Discovery(("a:1,b:2", "unix:/c")).watch()]
    assert seen == [{Address(("a:1", "b:2")), Address(("unix:/c",))}]


async def test_a_name_is_looked_up_again_and_keeps_its_addresses_if_that_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(discovery, "RESOLVE_SECONDS", 0)
    answers = [["10.0.0.1:5"], OSError("no name server"), ["10.0.0.1:5"], ["10.0.0.1:5", "10.0.0.2:5"], []]

    async def look_up(host: str, port: int) -> list[str]:
        assert (host, port) == ("shards", 5)
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    watch = Discovery(("dns:///shards:5", "a:1"), look_up).watch()
    fixed, first, second = (
        Address(("a:1",)),
        Address(("10.0.0.1:5",), server_name="shards"),
        Address(("10.0.0.2:5",), server_name="shards"),
    )
    assert [await anext(watch) for _ in range(3)] == [{fixed, first}, {fixed, first, second}, {fixed}]


async def test_a_name_gives_one_address_per_host_and_an_unknown_name_gives_none():
    found = await anext(Discovery(("dns:///localhost:50060", "dns:///no.such.host.invalid:1")).watch())
    assert {str(address) for address in found} in ({"127.0.0.1:50060"}, {"[::1]:50060"})


def test_the_other_ranks_are_named_or_on_consecutive_ports():
    assert Address(("h:10",)).other_ranks(3) == ("h:11", "h:12")
    assert Address(("[::1]:10",)).other_ranks(2) == ("[::1]:11",)
    assert Address(("h:10", "i:10")).other_ranks(2) == ("i:10",)
    assert Address(("unix:/a",)).other_ranks(2) == ()


def test_replicas_are_separated_by_semicolons_and_ranks_by_commas():
    settings = RouterSettings(shards="a:1,unix:/tmp/b; c:1 ;dns:///name.of.service:50052")
    assert settings.shards == ("a:1,unix:/tmp/b", "c:1", "dns:///name.of.service:50052")


@pytest.mark.parametrize("wrong", ["", "a", "a:1,", "a:1;", "http://a:1", "dns:///a", "a:x", "a:1 b:1"])
def test_an_invalid_address_is_refused_by_name(wrong: str):
    with pytest.raises(ValidationError, match="is not an address"):
        RouterSettings(shards=wrong)
