"""Adapters through a running server: sources, refusals, where they reside, and effects of slow or bad ones on
others."""

import asyncio
import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex import (
    AdapterForbiddenError,
    AdapterInUseError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterPinsError,
    AdapterReference,
    AdapterState,
    AdapterTier,
    AsyncClient,
    Client,
    InvalidRequestError,
    MergedAdapters,
)
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer, save_adapter
from tests.stand_in_hub import StandInHub

PROMPT = "Which adapter answers?"
OPTIONS = {"max_new_tokens": 8, "ignore_eos": True}
SECRET = "hf_a_secret_token"


@pytest.fixture(scope="module")
def hub() -> Iterator[StandInHub]:
    with StandInHub() as running:
        yield running


@pytest.fixture(scope="module")
def folder(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the adapters that tests may change; the first one is broken."""
    folder = Path(shutil.copytree(adapters, tmp_path_factory.mktemp("served") / "adapters"))
    shutil.copytree(folder / "r8", folder / "a-cut")
    (folder / "a-cut" / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def serving(model: Path, folder: Path, hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cache = tmp_path_factory.mktemp("hub-cache")
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_TOKEN": ""}
    flags = f"--adapters={folder}", "--kv-blocks=512", "--max-adapters-on-device=2", "--threads=1"
    with Server(str(model), *flags, env=env) as running:
        yield running
        running.assert_nothing_is_held()
        assert SECRET not in running.log


@pytest.fixture
def client(serving: Server) -> Iterator[Client]:
    with Client(serving.address) as connected:
        yield connected


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def expected(oracle: Oracle, adapter: str | None) -> list[int]:
    return oracle.generate(byte_tokenizer().encode(PROMPT), adapter, 8)[0]


def answer(client: Client, adapter: str | AdapterReference | None) -> list[int]:
    return [token.id for token in client.generate(PROMPT, adapter=adapter, **OPTIONS).sequences[0].tokens]


def test_a_hub_adapter_is_loaded_on_first_use(client: Client, hub: StandInHub, adapters: Path, oracle: Oracle):
    hub.push("org/r8", files_of(adapters / "r8"))
    assert answer(client, "org/r8") == expected(oracle, "r8")


def test_a_revision_is_pinned_and_the_default_branch_is_followed_on_reload(
    client: Client, hub: StandInHub, adapters: Path, oracle: Oracle
):
    first = hub.push("org/moving", files_of(adapters / "r4"))
    assert answer(client, "org/moving") == expected(oracle, "r4")
    hub.push("org/moving", files_of(adapters / "r12"))
    assert answer(client, "org/moving") == expected(oracle, "r4")  # requests do not ask the hub again
    assert client.load_adapter("org/moving").revision != first
    assert answer(client, "org/moving") == expected(oracle, "r12")
    assert answer(client, AdapterReference("org/moving", revision=first)) == expected(oracle, "r4")


def test_a_private_adapter_is_served_only_with_its_token_which_is_never_logged(
    client: Client, hub: StandInHub, adapters: Path, oracle: Oracle
):
    hub.push("org/private", files_of(adapters / "r64"), tokens=frozenset({SECRET}))
    assert answer(client, AdapterReference("org/private", token=SECRET)) == expected(oracle, "r64")
    with pytest.raises(AdapterNotFoundError):
        answer(client, "org/private")
    with pytest.raises((AdapterForbiddenError, AdapterNotFoundError)):
        answer(client, AdapterReference("org/private", token="hf_wrong"))


def test_an_adapters_own_chat_template_renders_its_conversations(client: Client, hub: StandInHub, adapters: Path):
    template = b"{% for m in messages %}[{{ m.content }}]{% endfor %}="
    hub.push("org/templated", {**files_of(adapters / "r8"), "chat_template.jinja": template})
    hub.push("org/endless", {**files_of(adapters / "r8"), "chat_template.jinja": b"{{ 'x' * 10 ** 10 }}"})
    messages = [{"role": "user", "content": "Hi"}]
    own = client.generate(messages, adapter="org/templated", **OPTIONS)
    assert own.text == client.generate("[Hi]=", adapter="org/templated", **OPTIONS).text
    assert own.sequences[0].usage.prompt_tokens == 5
    with pytest.raises(InvalidRequestError, match="chat template"):
        client.generate(messages, adapter="org/endless", **OPTIONS)
    models = client.generate(messages, adapter="r8", **OPTIONS)
    assert models.text == client.generate("<user>Hi<assistant>", adapter="r8", **OPTIONS).text


def test_an_adapters_own_end_tokens_end_its_answers(client: Client, hub: StandInHub, adapters: Path, oracle: Oracle):
    tokens = expected(oracle, "r8")
    end = tokens[3]
    files = {**files_of(adapters / "r8"), "generation_config.json": json.dumps({"eos_token_id": [end]}).encode()}
    hub.push("org/ending", files)
    (ended,) = client.generate(PROMPT, adapter="org/ending", max_new_tokens=8).sequences
    assert [token.id for token in ended.tokens] == tokens[: tokens.index(end) + 1]
    assert answer(client, "org/ending") == tokens  # the oracle ignores end tokens


async def test_a_slow_source_only_delays_its_own_requests(
    serving: Server, hub: StandInHub, adapters: Path, oracle: Oracle
):
    hub.push("org/slow", files_of(adapters / "r16"))
    hub.delay_s = 3.0
    async with AsyncClient(serving.address) as client:
        slow = asyncio.create_task(client.generate(PROMPT, adapter="org/slow", **OPTIONS))
        for adapter in (None, "r1", None, "r4"):
            quick = await client.generate(PROMPT, adapter=adapter, **OPTIONS)
            assert [token.id for token in quick.sequences[0].tokens] == expected(oracle, adapter)
            assert not slow.done()
        hub.delay_s = 0.0
        hub.release()
        assert [token.id for token in (await slow).sequences[0].tokens] == expected(oracle, "r16")


def test_changed_content_is_served_after_reloading_and_shares_no_cache_with_the_old(
    client: Client, folder: Path, model: Path, oracle: Oracle
):
    save_adapter(model, folder / "changing", 8, seed=50)
    prompt = "A prompt long enough to fill some blocks of the prefix cache. " * 2
    before = client.generate(prompt, adapter="changing", **OPTIONS)
    save_adapter(model, folder / "changing", 8, seed=51)
    assert client.load_adapter("changing").digest != before.adapter_digest
    after = client.generate(prompt, adapter="changing", **OPTIONS)
    assert after.sequences[0].usage.cached_tokens == 0
    assert after.text != before.text
    assert after.adapter_digest != before.adapter_digest


def test_the_listing_tells_where_each_adapter_is(client: Client, serving: Server):
    for name in ("r1", "r4", "r8"):
        answer(client, name)
    listed = {adapter.id: adapter for adapter in client.adapters() if adapter.source == "local"}
    assert listed["r8"].tier is AdapterTier.DEVICE and listed["r8"].lora_rank == 8 and listed["r8"].size_bytes > 0
    assert listed["r1"].tier is AdapterTier.HOST  # there are two slots for three adapters
    assert listed["attention"].tier is AdapterTier.DISK
    assert serving.metric('loraplex_adapters{tier="device"}') == 2


def unload_once_unused(client: Client, adapter: str) -> None:
    """Waits until the server has noticed that a stream was closed."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.unload_adapter(adapter)
        except AdapterInUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def test_an_adapter_is_unloaded_unless_it_is_in_use_and_reloaded_on_request(client: Client, oracle: Oracle):
    stream = client.stream(PROMPT, adapter="r12", max_new_tokens=4000, ignore_eos=True)
    next(stream)
    with pytest.raises(AdapterInUseError):
        client.unload_adapter("r12")
    stream.close()
    unload_once_unused(client, "r12")
    assert {adapter.id: adapter.tier for adapter in client.adapters()}["r12"] is AdapterTier.DISK
    with pytest.raises(AdapterNotFoundError):
        client.unload_adapter("r12")
    assert answer(client, "r12") == expected(oracle, "r12")


def test_unloading_waits_for_running_sequences_if_requested(client: Client, oracle: Oracle):
    stream = client.stream(PROMPT, adapter="r16", max_new_tokens=1000, ignore_eos=True)
    first = next(stream)
    with pytest.raises(AdapterInUseError):
        client.unload_adapter("r16")
    with ThreadPoolExecutor() as threads:
        unloading = threads.submit(client.unload_adapter, "r16", wait=True)
        while {adapter.id: adapter.state for adapter in client.adapters()}["r16"] is not AdapterState.UNLOADING:
            assert not unloading.done()
        late = threads.submit(answer, client, "r16")
        assert sum(len(piece.tokens) for piece in (first, *stream)) == 1000
        unloading.result(60)
        assert late.result(60) == expected(oracle, "r16")


def test_a_pinned_adapter_stays_on_the_device_and_pins_leave_a_slot_free(client: Client, oracle: Oracle):
    pinned = client.pin_adapter("r4")
    assert pinned.pinned and pinned.tier is AdapterTier.DEVICE
    with pytest.raises(AdapterPinsError):
        client.pin_adapter("r8")  # there are two slots
    for name in ("r8", "r1", "r12"):
        assert answer(client, name) == expected(oracle, name)
    listed = {adapter.id: adapter for adapter in client.adapters() if adapter.source == "local"}
    assert listed["r4"].tier is AdapterTier.DEVICE and listed["r12"].tier is AdapterTier.DEVICE
    assert abs((listed["r12"].last_used or 0) - time.time()) < 60
    assert listed["r12"].requests == 0 and len(listed["r12"].residences) == 1
    assert not client.unpin_adapter("r4").pinned
    for name in ("r8", "r1"):
        answer(client, name)
    assert {adapter.id: adapter.tier for adapter in client.adapters()}["r4"] is AdapterTier.HOST


def test_a_merged_adapter_is_unloaded_by_its_digest(client: Client):
    merged = client.generate(PROMPT, adapter=MergedAdapters(["r8", "attention"]), max_new_tokens=2)
    assert merged.adapter_digest in {adapter.digest for adapter in client.adapters()}
    client.unload_adapter(digest=merged.adapter_digest)
    assert merged.adapter_digest not in {adapter.digest for adapter in client.adapters()}
    with pytest.raises(AdapterNotFoundError):
        client.unload_adapter(digest=merged.adapter_digest)
    with pytest.raises(InvalidRequestError, match="digest"):
        client.unload_adapter(digest="../secret")


@pytest.mark.parametrize("name", ["absent", "../model", "/etc", "r8/../r4", "a" * 100])
def test_an_unknown_name_is_not_found_and_never_answered_by_the_base(client: Client, name: str):
    with pytest.raises((AdapterNotFoundError, AdapterInvalidError, InvalidRequestError)):
        answer(client, AdapterReference(name, source="local"))


def edit_config(**changes: object):
    def edit(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def cut_short(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def as_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edit_config(use_dora=True), "lora_magnitude_vector"),
        (edit_config(lora_bias=True), "lora_B.bias"),
        (edit_config(modules_to_save=["lm_head"]), "lm_head.weight"),
        (edit_config(r=16), "r=16|lora_rank|shape|16"),
        (edit_config(peft_type="IA3"), "feedforward_modules"),
        (edit_config(target_modules=["q_proj"]), "does not call for .*down_proj"),
        (cut_short, "adapter_model.safetensors"),
        (as_pickle, "safetensors"),
    ],
)
def test_a_malformed_adapter_is_refused_by_name_and_its_neighbours_are_served(
    client: Client, folder: Path, adapters: Path, oracle: Oracle, spoil, message: str, request: pytest.FixtureRequest
):
    bad = folder / f"bad-{abs(hash(request.node.name))}"
    shutil.copytree(adapters / "r8", bad)
    spoil(bad)
    with pytest.raises(AdapterInvalidError, match=message):
        answer(client, bad.name)
    assert answer(client, "r8") == expected(oracle, "r8")


def test_an_adapter_with_the_shapes_of_another_base_is_refused(client: Client, folder: Path, tmp_path: Path):
    other = LlamaConfig(
        vocab_size=257, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3
    )
    LlamaForCausalLM(other).save_pretrained(tmp_path)
    save_adapter(tmp_path, folder / "other-base", 8, seed=0)
    with pytest.raises(AdapterInvalidError, match="another base"):
        answer(client, "other-base")


def test_an_adapter_made_for_another_base_is_served_with_warnings(
    serving: Server, client: Client, folder: Path, oracle: Oracle
):
    shutil.copytree(folder / "r8", folder / "foreign")
    config = folder / "foreign" / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "meta-llama/Llama-2-7b-hf"})
    )
    before = {adapter.id: adapter for adapter in client.adapters()}
    assert "meta-llama/Llama-2-7b-hf" in before["foreign"].warnings[0] and not before["r8"].warnings
    assert client.load_adapter("foreign").warnings == before["foreign"].warnings
    assert answer(client, "foreign") == expected(oracle, "r8")
    assert {adapter.id: adapter for adapter in client.adapters()}["foreign"].warnings == before["foreign"].warnings
    with urlopen(f"{serving.url}/adapters") as response:
        listed = json.load(response)
    assert [entry["warnings"] for entry in listed if entry["id"] == "foreign"] == [list(before["foreign"].warnings)]
    assert "made for the base model 'meta-llama/Llama-2-7b-hf'" in serving.log


@pytest.mark.parametrize("name", ["Müller & Söhne/SQL v2 (neu)", "a=b@c%20d"])
def test_names_in_any_script_work_on_every_face(
    serving: Server, client: Client, folder: Path, oracle: Oracle, name: str
):
    shutil.copytree(folder / "r8", folder / name)
    assert answer(client, name) == expected(oracle, "r8")
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0) as other:
        assert other.models.retrieve(name).id == name
        completion = other.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0)
        assert completion.model == name
    client.unload_adapter(name)
    deadline = time.monotonic() + 60
    while f"did you mean {name!r}" not in refusal(client, name[:-1]):  # known names are as old as listing them is slow
        assert time.monotonic() < deadline


def refusal(client: Client, adapter: str) -> str:
    with pytest.raises(AdapterNotFoundError) as raised:
        client.generate(PROMPT, adapter=adapter, **OPTIONS)
    return raised.value.message


def test_broken_adapters_are_listed_and_refused_with_the_reason(client: Client):
    status = {adapter.id: adapter for adapter in client.adapters()}["a-cut"]
    assert (status.state, "cut short" in status.reason) == (AdapterState.BROKEN, True)
    with pytest.raises(AdapterInvalidError, match="cut short"):
        client.generate(PROMPT, adapter="a-cut", **OPTIONS)


def test_the_first_lines_of_a_server_only_name_adapters_that_can_be_requested(serving: Server):
    assert re.search(r"adapters  activated1, activated2, activated3 and \d+ more", serving.log)
