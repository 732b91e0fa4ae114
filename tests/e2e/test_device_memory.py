"""A server whose device has memory for few adapters gives all of them their turn, and refuses one that never fits."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex import AdapterInvalidError, Client
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer

PROMPT = "Which adapter has room?"
NAMES = "r4", "r12", "r8", "attention"
ROOM = 120_000  # bytes: for the second of them alone, or with the last one


def test_adapters_take_turns_in_memory_and_one_that_never_fits_is_refused(
    model: Path, adapters: Path, oracle: Oracle
) -> None:
    flags = f"--adapters={adapters}", "--kv-blocks=512", "--threads=1"
    with Server(str(model), *flags, f"--adapter-memory-gib={ROOM / 2**30}") as server, Client(server.address) as client:
        info = client.info()
        assert info.kv_cache_bytes > 0 and info.adapter_bytes > 0 and info.step_bytes == 0  # on a CPU

        def answer(name: str) -> list[int]:
            options = {"max_new_tokens": 24, "ignore_eos": True}
            return [token.id for token in client.generate(PROMPT, adapter=name, **options).sequences[0].tokens]

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(answer, NAMES * 3))
        prompt = byte_tokenizer().encode(PROMPT)
        assert answers == [oracle.generate(prompt, name, 24)[0] for name in NAMES * 3]
        assert server.metric('loraplex_adapter_evictions_total{tier="device"}') >= 1
        with pytest.raises(AdapterInvalidError, match=rf"bytes of the device's memory, .* may take {ROOM:,}"):
            answer("r64")
        server.assert_nothing_is_held()
