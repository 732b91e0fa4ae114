"""What `loraplex serve` prints once it is ready."""

import json
import shlex

import pytest
from rich.text import Text

from loraplex.cli.introduction import Pooled, introduction


def lines(*adapters: str) -> list[str]:
    text = introduction("org/model", "127.0.0.1:50051", "http://127.0.0.1:3000", adapters)
    return Text.from_markup(text).plain.splitlines()


def test_a_few_of_many_adapters_are_named() -> None:
    (line,) = [line for line in lines(*(f"a{number:04}" for number in range(1005))) if line.startswith("  adapters")]
    assert line.startswith("  adapters  a0000, a0001, a0002 and 1,002 more: ")


def test_examples_are_quoted_for_the_shell_whatever_the_adapters_name() -> None:
    name = "it's a 'new' one: \"sql\""
    shown = lines(name)
    commands = [shlex.split(line) for line in shown[shown.index("Try it:") + 1 :]]
    assert [command[command.index("--adapter") + 1] for command in commands if "--adapter" in command] == [name] * 2
    bodies = [json.loads(command[command.index("-d") + 1]) for command in commands if "-d" in command]
    assert [body.get("model") for body in bodies] == [None, name, None]
    assert bodies[0]["adapter"]["id"] == name


def test_without_adapters_none_are_mentioned() -> None:
    assert not [line for line in lines() if "adapter" in line]


def test_a_model_without_a_chat_template_is_not_asked_to_chat() -> None:
    text = introduction("org/base", "127.0.0.1:50051", "http://127.0.0.1:3000", (), chats=False)
    assert "messages" not in text and "loraplex chat" not in text and "/v1/completions" in text
    commands = [shlex.split(line) for line in text.split("Try it:\n")[1].splitlines()]
    bodies = [json.loads(command[command.index("-d") + 1]) for command in commands if "-d" in command]
    assert ["text" in bodies[0], "prompt" in bodies[1], "inputs" in bodies[2]] == [True] * 3


@pytest.mark.parametrize(
    ("pooled", "routes"),
    [("embed", {"v1/embeddings": {"model", "input"}, "embed": {"inputs"}}), ("classify", {"classify": {"inputs"}})],
)
def test_a_model_that_cannot_generate_is_asked_for_what_it_can(pooled: Pooled, routes: dict[str, set[str]]) -> None:
    text = introduction("org/model", "127.0.0.1:50051", "http://127.0.0.1:3000", (), chats=True, pooled=pooled)
    assert "generate" not in text and "loraplex chat" not in text
    script, grpc, *over_http = [shlex.split(line) for line in text.split("Try it:\n")[1].splitlines()]
    assert f").{pooled}(" in script[-1] and grpc[-1].endswith(f"/loraplex.v1.GenerationService/{pooled.capitalize()}")
    assert [command[1] for command in over_http] == [f"http://127.0.0.1:3000/{route}" for route in routes]
    bodies = [json.loads(command[command.index("-d") + 1]) for command in (grpc, *over_http)]
    assert [set(body) for body in bodies] == [{"inputs"}, *routes.values()]
