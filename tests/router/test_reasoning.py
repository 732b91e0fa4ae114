"""Thoughts are separated from answers, however these are divided into pieces."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_router.api.http.openai.chat import read_chat
from loraplex_router.api.http.openai.schema import ChatCompletionRequest
from loraplex_router.engine.generation import Generation
from loraplex_router.settings import EdgeSettings
from loraplex_router.text.reasoning import AUTO, FAMILIES, NONE, Reasoning, ReasoningParser, find_thoughts
from loraplex_router.text.renderer import Renderer
from loraplex_router.vocabulary.chat import ChatTemplates
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import Sample
from loraplex_router.vocabulary.thoughts import Thoughts
from tests.router.test_engine import MODEL, Setup
from tests.router.tiny_tokenizers import byte_tokenizer

THINK = Thoughts(("<think>",), ("</think>",))
GRANITE, HARMONY = FAMILIES["granite"], FAMILIES["openai_gptoss"]


def parse(pieces: list[str], thoughts: Thoughts) -> tuple[str, str]:
    """(thoughts, answer)"""
    parser, found = ReasoningParser(thoughts), list[Reasoning | str]()
    for piece in pieces:
        found += parser.feed(piece)
    found += parser.flush()
    assert all(piece.text if isinstance(piece, Reasoning) else piece for piece in found)
    thoughts = "".join(piece.text for piece in found if isinstance(piece, Reasoning))
    return thoughts, "".join(piece for piece in found if isinstance(piece, str))


def divided(text: str, data: st.DataObject) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    return [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]


@pytest.mark.parametrize(
    ("text", "begun", "found"),
    [
        ("<think>\nI add.\n</think>\n\nFour.\n", False, ("I add.\n", "Four.\n")),
        ("\n<think>I add.</think>Four.", False, ("I add.", "Four.")),
        ("I add.\n</think>\n\nFour.", True, ("I add.\n", "Four.")),
        ("<think>\nI add.</think>Four.", True, ("I add.", "Four.")),  # the tag is there twice
        ("I add < and </thin", True, ("I add < and </thin", "")),  # cut off
        ("\n\n", True, ("", "")),
        ("<think>\n\n</think>\n\nFour.", False, ("", "Four.")),
        ("Four. <think>no</think>", False, ("", "Four. <think>no</think>")),
        (" <thin", False, ("", " <thin")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("", False, ("", "")),
    ],
)
@given(data=st.data())
def test_thoughts_are_found_wherever_the_text_is_divided(
    text: str, begun: bool, found: tuple[str, str], data: st.DataObject
):
    assert parse(divided(text, data), replace(THINK, begun=begun)) == found


@pytest.mark.parametrize(
    ("text", "thoughts", "found"),
    [
        ("Here's my thought process: I add. Here is my response: 4", GRANITE, ("I add. ", "4")),
        ("Here is my answer: 4", GRANITE, ("", "Here is my answer: 4")),
        ("[THINK]I add.[/THINK]4", FAMILIES["mistral"], ("I add.", "4")),
        (
            "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>final<|message|> 4",
            HARMONY,
            ("I add.", " 4"),
        ),
        ("<|channel|>final<|message|>4", HARMONY, ("", "4")),
        ("I add.</think>4", FAMILIES["deepseek_r1"], ("I add.", "4")),
        ("<think>I add.", FAMILIES["deepseek_r1"], ("I add.", "")),
    ],
)
@given(data=st.data())
def test_every_family_has_its_tags(text: str, thoughts: Thoughts, found: tuple[str, str], data: st.DataObject):
    assert parse(divided(text, data), thoughts) == found


def test_only_what_may_be_a_tag_is_held_back():
    parser = ReasoningParser(replace(THINK, begun=True))
    assert parser.feed("I add") == [Reasoning("I add")]
    assert parser.feed(" a </th") == [Reasoning(" a ")]
    assert parser.feed("is") == [Reasoning("</this")]
    assert parser.feed("</think>") == [] == parser.feed("\n")
    assert parser.feed("Four") == ["Four"] and parser.feed("</think>") == ["</think>"]


def test_tags_are_seen_in_the_prompt_and_the_template():
    begun, shown = replace(THINK, begun=True), "{% if '</think>' in content %}"
    assert find_thoughts(AUTO, ["{{ no tags }}"], "<|assistant|>\n<think>\n") == begun
    assert find_thoughts(AUTO, [shown], "<|assistant|>") == THINK
    assert find_thoughts(AUTO, [shown], "<think>\n\n</think>\n\n") is None
    assert find_thoughts(AUTO, ["{{ '</seed:think>' }}"], "<seed:bos>assistant") == FAMILIES["seed_oss"]
    assert (
        find_thoughts(AUTO, ["<|start|>assistant<|channel|>final<|message|>"], "<|end|><|start|>assistant") == HARMONY
    )
    assert find_thoughts(AUTO, ["{{ messages }}"], "assistant\n") is None
    assert find_thoughts(NONE, [shown], "<think>") is None


def test_a_family_can_be_named_by_the_names_of_vllm_and_sglang():
    for name, family in (("qwen3", THINK), ("deepseek-r1", replace(THINK, begun=True)), ("gpt-oss", HARMONY)):
        named = EdgeSettings(reasoning_parser=name).reasoning_parser
        assert find_thoughts(named, ["{{ messages }}"], "assistant\n") == family
    assert find_thoughts("deepseek_r1", [""], "<think>\n\n</think>\n\n") is None
    with pytest.raises(ValueError, match="'qwen' is not one of auto, none, cohere_command3, "):
        EdgeSettings(reasoning_parser="qwen")


@asynccontextmanager
async def generation(template: str, *special: str, **fields: object) -> AsyncIterator[Generation]:
    """Of a chat with a model that has this template and these special tokens, besides </s>."""
    templates = ChatTemplates({"default": template})
    renderer = Renderer(templates)
    model = replace(MODEL, chat_templates=templates, renderer=renderer, tokenizer=byte_tokenizer(*special))
    service = Setup(model=model).service
    body = ChatCompletionRequest(messages=[{"role": "user", "content": "A"}], **fields)
    found = await service.generate(read_chat(body, ("base",), Sampling(), ""))
    yield found
    service.requests.close(found)
    await renderer.aclose()


async def test_a_format_begins_after_the_thoughts_that_there_may_be():
    for end, thoughts in (("<think>", replace(THINK, begun=True)), ("", None)):
        async with generation("{{ messages[0]['content'] }}" + end, response_format={"type": "json_object"}) as made:
            (output,) = made.outputs
            assert output.sequence.grammar and output.sequence.grammar.thoughts == thoughts == output.thoughts


async def test_tags_that_are_special_tokens_separate_thoughts_as_well():
    tags = "[THINK]", "[/THINK]"
    async with generation("{{ messages[0]['content'] }}{# [/THINK] #}", *tags) as made:
        (output,) = made.outputs
        assert output.thoughts
        tokenizer = byte_tokenizer(*tags)
        for token in await tokenizer.encode("[THINK]I</s>[/THINK]4"):
            output.push(Sample(token))
        delta = output.take()
        assert delta and parse([delta.text], output.thoughts) == ("I", "4")
