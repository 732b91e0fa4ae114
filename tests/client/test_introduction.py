"""The first lines of `loraplex serve`."""

import json
import shlex
from pathlib import Path

from rich.text import Text

from loraplex.cli.introduction import introduction


def lines(folder: Path | None) -> list[str]:
    text = introduction("org/model", "127.0.0.1:50051", "http://127.0.0.1:3000", folder)
    return Text.from_markup(text).plain.splitlines()


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name / file).touch()
    return folder


def listed(folder: Path) -> str:
    (line,) = [line for line in lines(folder) if line.startswith("  adapters")]
    return line


def test_a_few_of_many_adapters_are_named(tmp_path: Path) -> None:
    put(tmp_path, *(f"a{number:04}" for number in range(1005)))
    assert listed(tmp_path).startswith("  adapters  a0000, a0001, a0002 and 1,002 more: ")


def test_what_cannot_be_asked_for_is_not_named(tmp_path: Path) -> None:
    put(tmp_path, "a,b", "a*", "sql")
    (tmp_path / "sql2").mkdir()
    (tmp_path / "sql2" / "adapter_config.json").touch()
    assert listed(tmp_path) == "  adapters  sql"


def test_examples_are_what_a_shell_reads_whatever_an_adapter_is_called(tmp_path: Path) -> None:
    name = "it's a 'new' one: \"sql\""
    shown = lines(put(tmp_path, name))
    commands = [shlex.split(line) for line in shown[shown.index("Try it:") + 1 :]]
    assert [command[command.index("--adapter") + 1] for command in commands if "--adapter" in command] == [name] * 2
    bodies = [json.loads(command[command.index("-d") + 1]) for command in commands if "-d" in command]
    assert [body.get("model") for body in bodies] == [None, name, None]
    assert bodies[0]["adapter"]["id"] == name


def test_without_adapters_there_is_no_word_of_them() -> None:
    assert not [line for line in lines(None) if "adapter" in line]


def test_a_model_without_a_chat_template_is_not_asked_to_chat() -> None:
    text = introduction("org/base", "127.0.0.1:50051", "http://127.0.0.1:3000", None, chats=False)
    assert "messages" not in text and "loraplex chat" not in text and "/v1/completions" in text
    commands = [shlex.split(line) for line in text.split("Try it:\n")[1].splitlines()]
    bodies = [json.loads(command[command.index("-d") + 1]) for command in commands if "-d" in command]
    assert ["text" in bodies[0], "prompt" in bodies[1], "inputs" in bodies[2]] == [True] * 3
