"""`lorax-client` 0.6.3 from PyPI, unmodified."""

from collections.abc import Callable

IMPORTS = """
import asyncio, json, sys
from lorax import AsyncClient, Client, MergedAdapters
from lorax.errors import *
url = sys.argv[1]
client = Client(url)
def raises(error, call, *args, **options):
    try:
        call(*args, **options)
    except error as raised:
        return str(raised)
    raise AssertionError(f"no {error.__name__}")
"""


def test_generate_answers_with_text_details_and_tokens(run_script: Callable[[str], None]):
    run_script(
        IMPORTS
        + """
base = client.generate("Hello", max_new_tokens=5, decoder_input_details=True, return_k_alternatives=2)
details = base.details
assert (details.finish_reason.value, details.prompt_tokens, details.generated_tokens) == ("length", 5, 5)
assert details.seed is None and details.prefill[0].logprob is None and details.prefill[1].logprob < 0
assert "".join(token.text for token in details.tokens) == base.generated_text
assert all(token.logprob < 0 and len(token.alternative_tokens) == 2 for token in details.tokens)
adapted = client.generate("Hello", adapter_id="first", adapter_source="local", max_new_tokens=5)
assert adapted.generated_text != base.generated_text
assert client.generate("Hello", max_new_tokens=5, return_full_text=True).generated_text == "Hello" + base.generated_text
assert client.generate("Well, Hello", max_new_tokens=5, truncate=5).generated_text == base.generated_text
stop = base.generated_text[:2]
stopped = client.generate("Hello", max_new_tokens=5, stop_sequences=[stop])
assert stopped.generated_text == stop and stopped.details.finish_reason.value == "stop_sequence"
"""
    )


def test_sampling_is_repeatable_by_its_seed_and_best_of_returns_the_others(run_script: Callable[[str], None]):
    run_script(
        IMPORTS
        + """
options = dict(max_new_tokens=8, do_sample=True, temperature=0.9, top_k=50, top_p=0.95, typical_p=0.95, seed=7)
first, second = (client.generate("Hello", **options) for _ in range(2))
assert first == second and first.details.seed == 7
best = client.generate("Hello", max_new_tokens=4, do_sample=True, best_of=3)
assert len(best.details.best_of_sequences) == 2
mean = lambda tokens: sum(token.logprob for token in tokens) / len(tokens)
assert mean(best.details.tokens) >= max(mean(other.tokens) for other in best.details.best_of_sequences)
"""
    )


def test_a_stream_has_one_event_per_token_and_the_whole_text_in_the_last(run_script: Callable[[str], None]):
    run_script(
        IMPORTS
        + """
whole = client.generate("Hello", adapter_id="second", max_new_tokens=9)
events = list(client.generate_stream("Hello", adapter_id="second", max_new_tokens=9))
assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
assert "".join(event.token.text for event in events) == events[-1].generated_text == whole.generated_text
assert events[-1].details.generated_tokens == 9 and all(event.generated_text is None for event in events[:-1])
async def stream():
    asynchronous = AsyncClient(url)
    assert (await asynchronous.generate("Hello", adapter_id="second", max_new_tokens=9)) == whole
    return [event.token.id async for event in asynchronous.generate_stream(
        "Hello", adapter_id="second", max_new_tokens=9)]
assert asyncio.run(stream()) == [event.token.id for event in events]
"""
    )


def test_merged_adapters_and_a_response_format(run_script: Callable[[str], None]):
    run_script(
        IMPORTS
        + """
for strategy in ("linear", "ties", "dare_linear", "dare_ties"):
    merged = MergedAdapters(ids=["first", "second"], weights=[0.5, 0.5], density=0.5, merge_strategy=strategy)
    assert len(client.generate("Hello", merged_adapters=merged, max_new_tokens=3).details.tokens) == 3
schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
answer = client.generate("Hello", response_format={"type": "json_object", "schema": schema}, max_new_tokens=30)
assert set(json.loads(answer.generated_text)) == {"a"} and answer.details.finish_reason.value == "eos_token"
"""
    )


def test_errors_are_the_clients_own_classes_streaming_or_not(run_script: Callable[[str], None]):
    run_script(
        IMPORTS
        + """
raises(NotFoundError, client.generate, "Hello", adapter_id="absent", adapter_source="local")
assert "max_new_tokens" in raises(ValidationError, client.generate, "Hello", max_new_tokens=10**6)
assert "watermark" in raises(ValidationError, client.generate, "Hello", watermark=True)
stream = lambda **options: list(client.generate_stream("Hello", **options))
raises(NotFoundError, stream, adapter_id="absent", adapter_source="local")
assert "max_new_tokens" in raises(ValidationError, stream, max_new_tokens=10**6)
"""
    )
