"""`text-generation` 0.7.0 from PyPI, unmodified."""

from collections.abc import Callable


def test_generate_stream_and_chat(run_script: Callable[[str], None]):
    run_script(
        """
import asyncio, json, sys
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar
client = Client(sys.argv[1], timeout=60)
whole = client.generate("Hello", max_new_tokens=6, decoder_input_details=True)
assert whole.details.generated_tokens == 6 and len(whole.details.prefill) == 5
events = list(client.generate_stream("Hello", max_new_tokens=6))
assert "".join(event.token.text for event in events) == whole.generated_text == events[-1].generated_text
assert asyncio.run(AsyncClient(sys.argv[1], timeout=60).generate("Hello", max_new_tokens=6)) is not None
digits = client.generate("Hello", grammar=Grammar(type="regex", value="[0-9]{3}"), max_new_tokens=9)
assert len(digits.generated_text) == 3 and digits.generated_text.isdigit()
schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
made = client.generate("Hello", grammar=Grammar(type="json", value=schema), max_new_tokens=30)
assert set(json.loads(made.generated_text)) == {"a"}
chat = client.chat([{"role": "user", "content": "Hi"}], max_tokens=4)
assert chat.choices[0].message.role == "assistant" and chat.usage["completion_tokens"] == 4
try:
    client.generate("Hello", max_new_tokens=10**6)
    raise AssertionError
except ValidationError as error:
    assert "max_new_tokens" in str(error)
"""
    )
