"""Chat templates are rendered in separate processes: bad ones do not affect others, and have clear errors."""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loraplex_protos.errors import AdapterInvalidError, InvalidRequestError, OverloadedError, UnavailableError
from loraplex_router.text.renderer import LONG, Renderer
from loraplex_router.vocabulary.chat import AdapterTokenizer, Chat, ChatTemplates, Message, RenderedChat

CHAT = Chat((Message("user", "Hi ✓", {"name": "Ann"}),), variables={"mood": "good"})
GOOD = "{{ bos_token }}{{ messages[0].name }}: {{ messages[0].content }} {{ mood }}{{ eos_token }}"
RENDERED = RenderedChat("<s>Ann: Hi ✓ good</s>")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
OWN = ChatTemplates({"default": GOOD}, TOKENS)
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TOO_MUCH = "{% set x = 'x' * 10 ** 10 %}{{ x }}"


def brought(template: str) -> ChatTemplates:
    return ChatTemplates({"default": template}, TOKENS)


@pytest.fixture
async def renderer() -> AsyncIterator[Renderer]:
    running = Renderer(OWN, render_seconds=1)
    yield running
    await running.aclose()


async def test_an_adapters_template_renders_like_the_models(renderer: Renderer):
    assert await renderer.render(OWN, CHAT) == RENDERED
    assert await renderer.render(ChatTemplates({"default": GOOD, "rag": ""}, TOKENS), CHAT) == RENDERED
    with pytest.raises(InvalidRequestError, match="no tools here"):
        await renderer.render(brought("{{ raise_exception('no tools here') }}"), CHAT)


async def test_the_text_that_a_template_writes_after_an_answer_is_known(renderer: Renderer):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
    assert (await renderer.render(brought(template), CHAT)).turn_end == "<|end|>\n"


async def test_a_template_that_cannot_be_parsed_names_the_line_and_only_prevents_chats(
    caplog: pytest.LogCaptureFixture,
):
    renderer = Renderer(brought("Hi\n{% if %}"))
    with caplog.at_level(logging.WARNING):
        await renderer.check()
    assert "line 2" in caplog.text
    with pytest.raises(InvalidRequestError, match=r"the model's chat template cannot be parsed: line 2: Expected"):
        await renderer.render(brought("Hi\n{% if %}"), CHAT)
    with pytest.raises(AdapterInvalidError, match=r"the adapter's chat template cannot be parsed: line 1: .* 'nope'"):
        await renderer.render(brought("{{ 'x' | nope }}"), CHAT)
    await renderer.aclose()


@pytest.mark.parametrize("bad", [FOREVER, TOO_MUCH, "{{ 'x' * 10 ** 8 }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}"])
async def test_a_bad_template_does_not_affect_others(renderer: Renderer, bad: str):
    with pytest.raises(InvalidRequestError, match=r"chat\.messages"):
        await renderer.render(brought(bad), CHAT)
    assert await renderer.render(brought(GOOD), CHAT) == RENDERED


async def test_the_models_own_conversations_do_not_wait_for_an_adapters_template(renderer: Renderer):
    await renderer.check()
    slow = asyncio.create_task(renderer.render(brought(FOREVER), CHAT))
    await asyncio.sleep(0)
    assert await renderer.render(OWN, CHAT) == RENDERED
    assert not slow.done()
    with pytest.raises(InvalidRequestError, match="too much time"):
        await slow


async def test_a_good_template_does_not_wait_for_conversations_with_one_that_never_ends(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("loraplex_router.text.renderer.MOST_SLOW", 1)
    await renderer.render(brought(GOOD), CHAT)
    bad = [asyncio.create_task(renderer.render(brought(FOREVER), CHAT)) for _ in range(12)]
    await asyncio.sleep(0)
    assert await renderer.render(brought(GOOD), CHAT) == RENDERED
    assert await renderer.render(brought(GOOD), CHAT, "another tenant") == RENDERED
    assert not any(task.done() for task in bad)
    refused, left = await asyncio.wait(bad, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(OverloadedError, match="wait for this chat template"):
        await refused.pop()
    for task in left:
        task.cancel()


async def test_a_conversation_whose_client_left_is_not_rendered(renderer: Renderer):
    await renderer.render(brought(GOOD), CHAT)
    bad = [asyncio.create_task(renderer.render(brought(f"{FOREVER}{n}"), CHAT)) for n in range(100)]
    await asyncio.sleep(0)
    for task in bad:
        task.cancel()
    assert await renderer.render(brought(GOOD), CHAT) == RENDERED
    assert (await asyncio.gather(*bad, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_the_next_caller_does_not_get_the_answer_of_one_that_left(renderer: Renderer):
    left = asyncio.create_task(renderer.render(OWN, Chat((Message("user", "gone", {"name": "Bob"}),))))
    await asyncio.sleep(0.01)
    left.cancel()
    assert await renderer.render(OWN, CHAT) == RENDERED


PRINTS = "print('a library has something to say')\n"
ENDS = "import os, sys\nif 'loraplex_router.text.template_process' in sys.orig_argv: os._exit(1)\n"


async def test_a_librarys_output_is_not_taken_for_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sitecustomize.py").write_text(PRINTS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    renderer = Renderer(OWN)
    assert await renderer.render(OWN, CHAT) == RENDERED
    await renderer.aclose()


async def test_a_file_of_the_current_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "jinja2.py").write_text(ENDS)
    monkeypatch.chdir(tmp_path)
    renderer = Renderer(OWN)
    assert await renderer.render(OWN, CHAT) == RENDERED
    await renderer.aclose()


async def test_a_process_that_cannot_start_is_a_temporary_server_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sitecustomize.py").write_text(ENDS)
    renderer = Renderer(OWN)
    with monkeypatch.context() as broken, pytest.raises(UnavailableError, match="at the moment: try again"):
        broken.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
        await renderer.check()
        await renderer.render(OWN, CHAT)
    assert await renderer.render(OWN, CHAT) == RENDERED
    await renderer.aclose()


async def test_a_process_that_hangs_while_it_starts_is_given_up_and_ends_with_the_renderer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(600)")
    hanging = Renderer(OWN)
    async with asyncio.timeout(60):
        with monkeypatch.context() as broken:
            broken.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
            broken.setattr("loraplex_router.text.renderer.START_SECONDS", 0.1)
            with pytest.raises(UnavailableError, match="at the moment: try again"):
                await hanging.render(OWN, CHAT)
            broken.setattr("loraplex_router.text.renderer.START_SECONDS", 600)
            asking = asyncio.create_task(hanging.render(OWN, CHAT))
            while hanging._quick._process is None:
                await asyncio.sleep(0.01)
            await hanging.aclose()
        with pytest.raises(InvalidRequestError, match="shutting down"):
            await asking


async def test_a_long_conversation_is_rendered_completely(renderer: Renderer):
    text = "wörd " * LONG
    rendered = await renderer.render(OWN, Chat((Message("user", text, {"name": "Ann"}),)))
    assert rendered.text == f"<s>Ann: {text} </s>"


async def test_too_deep_nesting_is_refused(renderer: Renderer):
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        await renderer.render(OWN, Chat((Message("user", "Hi", {"name": nested}),)))


async def test_a_tools_schema_may_contain_integers_of_any_size(renderer: Renderer):
    tool = {"type": "function", "function": {"name": "pay", "parameters": {"maximum": 2**256}}}
    rendered = await renderer.render(brought("{{ tools[0] | tojson }}"), Chat(CHAT.messages, (tool,)))
    assert str(2**256) in rendered.text


async def test_without_a_default_template_the_error_lists_the_others():
    renderer = Renderer(ChatTemplates({"tool_use": "{{ tools }}"}))
    with pytest.raises(InvalidRequestError, match="no chat template, only tool_use: send a text prompt"):
        await renderer.render(ChatTemplates({"tool_use": "{{ tools }}"}), CHAT)
    with pytest.raises(InvalidRequestError, match="no chat template: send a text prompt"):
        await renderer.render(ChatTemplates(), CHAT)


@pytest.mark.parametrize(
    ("module", "absent"), [("loraplex_router.text.template_process", "torch"), ("loraplex_router.app", "transformers")]
)
def test_slow_imports_only_happen_where_they_are_needed(module: str, absent: str):
    subprocess.run([sys.executable, "-c", f"import sys, {module}; assert {absent!r} not in sys.modules"], check=True)


def test_an_adapters_special_tokens_override_the_models():
    adapter = AdapterTokenizer(ChatTemplates({}, {"eos_token": "<|end|>", "bos_token": ""}))
    assert adapter.over(OWN) == ChatTemplates(OWN.by_name, {"eos_token": "<|end|>"})
    with pytest.raises(AdapterInvalidError, match="torn"):
        AdapterTokenizer(error="torn").over(OWN)


def test_an_adapter_without_a_default_template_uses_the_models():
    adapter = AdapterTokenizer(ChatTemplates({"rag": "mine"}))
    assert adapter.over(OWN) == OWN
