"""Chat templates of adapters, rendered in their own process: what a bad one can do to others."""

from collections.abc import AsyncIterator

import pytest

from loraplex_protos.errors import AdapterInvalidError, InvalidRequestError
from loraplex_router.text.chat import Chat, Message, RenderedChat
from loraplex_router.text.foreign_templates import ForeignTemplates

CHAT = Chat((Message("user", "Hi ✓", {"name": "Ann"}),), variables={"mood": "good"})
GOOD = "{{ bos_token }}{{ messages[0].name }}: {{ messages[0].content }} {{ mood }}{{ eos_token }}"
RENDERED = RenderedChat("<s>Ann: Hi ✓ good</s>")
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TOO_MUCH = "{% set x = 'x' * 10 ** 10 %}{{ x }}"


@pytest.fixture
async def templates() -> AsyncIterator[ForeignTemplates]:
    running = ForeignTemplates("<s>", "</s>", render_seconds=1)
    yield running
    await running.aclose()


async def test_a_template_renders_as_the_models_own_does(templates: ForeignTemplates):
    assert await templates.render(GOOD, CHAT) == RENDERED
    with pytest.raises(InvalidRequestError, match="no tools here"):
        await templates.render("{{ raise_exception('no tools here') }}", CHAT)
    with pytest.raises(AdapterInvalidError, match="cannot be read"):
        await templates.render("{% if %}", CHAT)


@pytest.mark.parametrize("bad", [FOREVER, TOO_MUCH, "{{ 'x' * 10 ** 8 }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}"])
async def test_a_bad_template_hurts_itself_alone(templates: ForeignTemplates, bad: str):
    with pytest.raises(InvalidRequestError, match=r"chat\.messages"):
        await templates.render(bad, CHAT)
    assert await templates.render(GOOD, CHAT) == RENDERED
