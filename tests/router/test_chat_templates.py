"""Prompts that many kinds of chat templates render from OpenAI's messages, compared with transformers."""

import json
import re
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from loraplex_router.text.template import Template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "image_token": "<img>"}
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CALL = '{"name": "add", "arguments": {"a": 1}}'
TOOL = {"type": "function", "function": {"strict": True, "name": "add", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Weather?"}
RESULT = {"role": "tool", "tool_call_id": "call12345", "content": "rain"}

# How templates write calls: the relevant parts of Hermes', Qwen3's, DeepSeek's, GLM's and Gemma's.
WRITE_CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} ARGUMENTS{% endfor %}"
)
WRITE_CALLS += "{{ m.content or '' }};{% endfor %}"
ARGUMENTS = {
    "object": "{{ c.function.arguments | tojson }}",
    "either": "{% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}",
    "text": "{{ '(' + c.function.arguments + ')' }}",
    "printed": "{{ c.function.arguments }}",
    "walked": "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    "braces": "{% set args = c.function.arguments %}{ {%- if args is string %}{{ args }}"
    "{% else %}{% for k, v in args | items %}{{ k }}: {{ v }}{% endfor %}{% endif -%} }",
    "whole": "{{ c.function | tojson }}",
}


def render(source: str, messages: list[dict[str, Any]], *args: Any, **options: Any) -> str:
    return Template(source, TOKENS).render(messages, *args, **options)


def reference(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = PreTrainedTokenizerBase(chat_template=source, **TOKENS)
    options = {"add_generation_prompt": True, **options}
    return str(PreTrainedTokenizerFast.apply_chat_template(tokenizer, messages, tokenize=False, **options))


def calls(arguments: Any, content: Any = None) -> list[dict[str, Any]]:
    function = {"name": "add", "arguments": arguments}
    call = {"id": "call12345", "type": "function", "function": function}
    return [USER, {"role": "assistant", "content": content, "tool_calls": [call]}, RESULT]


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('%Y') }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages | tojson(ensure_ascii=true) }}{{ messages | tojson }}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ image_token }}{{ sep_token is defined }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ dict(a=1) }}",
        "{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ add_generation_prompt }}",
        "  {% if true %}\n  a\n  {% endif %}\n{{ messages[0]['content'] }}\n",
        "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.name }}{{ m.x }}{% endfor %}",
        "{{ messages[1].content is defined }}{{ messages[1].refusal }}",
    ],
)
def test_templates_have_the_features_of_transformers(source: str):
    messages = [
        {"role": "user", "content": "Wörd <b>", "name": "Ann", "x": {"y": 5}},
        {"role": "assistant", "content": None, "refusal": "No.", "reasoning": "Hm."},
    ]
    assert render(source, messages) == reference(source, messages)


def test_variables_are_set_as_transformers_sets_them():
    source = "{{ enable_thinking }}{{ bos_token }}{{ documents }}{{ add_generation_prompt }}"
    variables = {"enable_thinking": False, "bos_token": "<b>", "documents": [{"text": "x"}]}
    assert render(source, [USER], variables=variables) == reference(source, [USER], **variables)
    assert render(source, [USER], documents=[{"text": "y"}]) == reference(source, [USER], documents=[{"text": "y"}])
    assert render(source, [USER], variables={"add_generation_prompt": False}).endswith("False")
    with pytest.raises(ValueError, match="cannot set chat_template, messages"):
        render(source, [USER], variables={"messages": [], "chat_template": "x"})


@pytest.mark.parametrize(
    "content", ["It is", "It is ", [{"type": "text", "text": "It"}, {"type": "text", "text": " is"}]]
)
@pytest.mark.parametrize("written", ["{{ m.content }}", "{{ m.content | trim }}"])
def test_the_last_message_is_continued_as_transformers_does(written: str, content: Any):
    source = (
        "{% for m in messages %}<{{ m.role }}>"
        + written
        + "</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    rows = [USER, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    text = content if isinstance(content, str) else "It\n is"
    expected = reference(source, [USER, {"role": "assistant", "content": text}], **options)
    assert render(source, rows, **options) == expected
    with pytest.raises(ValueError, match='no "content" to continue'):
        render(source, [USER, {"role": "assistant"}], **options)


def test_a_template_cannot_reach_outside_its_sandbox():
    with pytest.raises(jinja2.exceptions.SecurityError):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}", [USER])


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("object", "add {'a': 1}"),
        ("either", "add {'a': 1}"),
        ("text", "add ({'a': 1})"),
        ("printed", "add {'a': 1}"),
        ("walked", "add a=1"),
        ("braces", "add {a: 1}"),
        ("whole", "add {'name': 'add', 'arguments': {'a': 1}}"),
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_arguments_are_text_or_an_object_as_the_template_expects(form: str, written: str, content: str | None):
    source = WRITE_CALLS.replace("ARGUMENTS", ARGUMENTS[form])
    expected = f"Weather?;<call>{written.replace(chr(39), chr(34))};rain;"
    assert render(source, calls('{"a": 1}', content)) == expected
    assert render(source, calls({"a": 1}, content)) == expected
    assert render(source + "{{ tools[0].function.name }}", calls('{"a": 1}', content), [TOOL]) == f"{expected}add"


@pytest.mark.parametrize("empty", ["{}", "", " \n", "null", None, {}])
def test_missing_arguments_are_an_empty_object_in_every_notation(empty: Any):
    for form in ("object", "either", "printed"):
        assert "<call>add {};" in render(WRITE_CALLS.replace("ARGUMENTS", ARGUMENTS[form]), calls(empty))
    assert "<call>add ({});" in render(WRITE_CALLS.replace("ARGUMENTS", ARGUMENTS["text"]), calls(empty))
    assert "<call>add ;" in render(WRITE_CALLS.replace("ARGUMENTS", ARGUMENTS["walked"]), calls(empty))


def test_text_stays_as_the_model_wrote_it():
    for text in ('{"a":1,\n"b": 2}', "no JSON"):
        assert f"<call>add {text};" in render(WRITE_CALLS.replace("ARGUMENTS", ARGUMENTS["either"]), calls(text))
    assert '<call>add "no JSON";' in render(WRITE_CALLS.replace("ARGUMENTS", ARGUMENTS["object"]), calls("no JSON"))


DESCRIBED = {  # how templates write tools: gpt-oss', Qwen3-Coder's, Command R's, Hermes'
    "concatenated": ("{{ f.name + ': ' + f.description }}", "add: "),
    "walked": ("{{ f.name }}{% for n, p in f.parameters.properties | items %}{{ n }}{% endfor %}", "add"),
    "items": ("{{ f.name }}{% for n, p in f.parameters.properties.items() %}{{ n }}{% endfor %}", "add"),
    "parameters": ("{{ f.parameters | tojson }}", '{"type": "object", "properties": {}}'),
    "whole": ("{{ f | tojson }}", '{"name": "add"}'),
}


@pytest.mark.parametrize(("written", "expected"), DESCRIBED.values(), ids=DESCRIBED)
def test_a_tool_may_lack_fields_that_the_template_needs(written: str, expected: str):
    source = "{% for t in tools or [] %}{% set f = t.function %}" + written + "{% endfor %}{{ messages[0].content }}"
    for lacking in ({}, {"description": None, "parameters": None}):
        tool = {"type": "function", "function": {"name": "add", **lacking}}
        assert render(source, [USER], [tool]) == f"{expected}Weather?"
    tool = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}
    if "items()" not in written:
        assert render(source, [USER], [tool]) == reference(source, [USER], tools=[tool])
    else:
        assert render(source, [USER], [tool]) == "addWeather?"


CALLS_IF_NONE = (  # like DeepSeek-R1-Distill: a message only has calls if its content is none
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    "<call>{{ c.function.name + c.function.arguments }}{% endfor %}{% else %}{{ m.content }};{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("content", [None, ""])
def test_calls_are_not_lost_if_the_content_must_be_none(content: str | None):
    assert render(CALLS_IF_NONE, calls("{}", content)) == "Weather?;<call>add{}rain;"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content + ';' }}{% endfor %}",
        "{% for m in messages %}{{ '' if m.content is not string else m.content }};{% endfor %}",
        "{% for m in messages %}{% if m.content is none %}None{% endif %}{{ m.content | trim }};{% endfor %}",
        "{% for m in messages %}{{ m['content'] }};{% endfor %}",
    ],
)
def test_missing_content_is_rendered_as_empty_text(source: str):
    assert render(source, [USER, {"role": "assistant", "content": None}, USER]) == "Weather?;;Weather?;"


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
READ_PARTS = "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("content", "of_text", "of_parts"),
    [
        ("{{ m.content }}", "one two", "one\ntwo"),
        ("{{ m.content | trim }}", "one two", "one\ntwo"),
        ("{{ m.content | tojson }}", '"one two"', '"one\\ntwo"'),
        (READ_PARTS, "[one two]", "[one][two]"),
        (
            "{% if m.content is string %}{{ m.content }}{% else %}" + READ_PARTS + "{% endif %}",
            "one two",
            "[one][two]",
        ),
        ("{{ m.content if m.content is string else m.content[0].text }}", "one two", "one\ntwo"),  # only reads one
    ],
)
def test_a_list_of_parts_is_read_as_parts_or_as_their_text(content: str, of_text: str, of_parts: str):
    source = f"{{% for m in messages %}}<{{{{ m.role }}}}>{content}{{% endfor %}}"
    for role in ("system", "user"):
        assert render(source, [{"role": role, "content": "one two"}]) == f"<{role}>{of_text}"
        assert render(source, [{"role": role, "content": PARTS}]) == f"<{role}>{of_parts}"


def test_parts_are_only_passed_to_roles_that_read_them():
    source = "{% for m in messages %}{% if m.role == 'user' and m.content is not string %}" + READ_PARTS
    source += "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    assert render(source, [{"role": role, "content": PARTS} for role in ("system", "user")]) == "one\ntwo;[one][two];"


def test_developer_messages_are_system_messages_unless_the_template_knows_developers():
    messages = [{"role": "developer", "content": "Be brief."}]
    assert render(PLAIN, messages) == "<system>Be brief."
    assert render(PLAIN + "{# developer #}", messages) == "<developer>Be brief."


def test_tools_are_passed_on_as_the_client_sent_them():
    assert render("{{ tools[0] | tojson }}", [USER], [TOOL]) == json.dumps(TOOL)


def test_a_template_that_reads_no_tools_gets_them_in_the_system_message():
    messages = [{"role": "system", "content": "Be brief."}, *calls('{"a": 1}')]
    prompt = render(PLAIN, messages, [TOOL])
    assert prompt.startswith("<system>Be brief.") and json.dumps(TOOL) in prompt
    assert f"<assistant><tool_call>\n{CALL}\n</tool_call>" in prompt
    assert prompt.endswith("<user><tool_response>\nrain\n</tool_response>")
    assert prompt.count("<system>") == 1


def test_calls_that_a_template_does_not_show_become_text_even_without_tools():
    assert f"<assistant><tool_call>\n{CALL}\n</tool_call><tool>rain" in render(PLAIN, calls('{"a": 1}'))


def test_results_that_a_template_refuses_become_text():
    source = (
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('who?') }}{% endif %}"
    )
    source += "<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert render(source, calls("{}")).endswith("</tool_call><user><tool_response>\nrain\n</tool_response>")
    prompt = render(source, [USER], [TOOL])
    assert prompt.startswith("<user>You may call") and prompt.endswith("\n\nWeather?")


def test_a_template_may_write_a_calls_id_but_not_its_name():
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    source += "{{ c.id }}({{ c.function.arguments }}){% endfor %}{% endfor %}"
    assert render(source, calls("{}")) == "<user>Weather?<assistant>call12345({})<tool>rain"


@pytest.mark.parametrize(
    ("check", "form"),
    [
        ("c.id | length != 9", r"[0-9a-f]{9}"),
        ("'functions.' + c.function.name + ':' not in c.id", r"functions\.add:0"),
    ],
)
def test_ids_of_calls_have_the_form_that_the_template_accepts(check: str, form: str):
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if CHECK %}{{ raise_exception('id') }}{% endif %}"
    )
    source = source.replace("CHECK", check) + "{{ c.function.name }} {{ c.id }};{% endfor %}"
    source += "{{ m.tool_call_id }};{% endfor %}"
    messages = calls("{}")
    messages[1]["tool_calls"][0]["id"] = messages[2]["tool_call_id"] = "call_0123456789"
    found = re.fullmatch(rf";add ({form});;({form});", render(source, messages))
    assert found and found[1] == found[2]
    kept = {"[0-9a-f]{9}": "Abcde1234"}.get(form, "functions.add:0")
    messages[1]["tool_calls"][0]["id"] = messages[2]["tool_call_id"] = kept
    assert render(source, messages) == f";add {kept};;{kept};"


def test_a_template_that_needs_tools_is_tested_with_tools():
    source = "{% for t in tools %}{{ t.function.name }};{% endfor %}" + WRITE_CALLS.replace(
        "ARGUMENTS", ARGUMENTS["text"]
    )
    assert render(source, calls({"a": 1}), [TOOL]) == 'add;Weather?;<call>add ({"a": 1});rain;'


def test_without_tools_a_conversation_is_unchanged():
    messages = [USER, USER, {"role": "narrator", "content": "Night falls."}, {"role": "system", "content": "Sing!"}]
    assert render(PLAIN, messages) == reference(PLAIN, messages)


def test_a_templates_own_errors_are_passed_on():
    source = "{% if messages[0].role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        render(source, [USER])
