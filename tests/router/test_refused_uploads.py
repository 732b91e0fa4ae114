from collections.abc import AsyncIterator

import pytest

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.uploads import MOST_REST, read_rest


class Messages:
    """Those that a client still sends; `number`: of them."""

    def __init__(self, number: int) -> None:
        self.read, self._number = 0, number

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.read < self._number:
            self.read += 1
            yield b"x"


@pytest.mark.parametrize("sent", [0, 1, 10, 10**6])
async def test_a_refusal_waits_for_what_a_client_still_sends_if_that_is_little(sent: int):
    messages = Messages(sent)
    with pytest.raises(InvalidRequestError, match="header"):
        async with read_rest(messages):
            raise InvalidRequestError(FieldViolation("header", "send it in the first message"))
    assert messages.read == min(sent, MOST_REST)
