"""The services' log lines: text for people or JSON for programs, and always one line, whatever a client sent."""

import json
import logging
import subprocess
import sys

from loraplex.cli.logs import Always, JsonFormatter, TextFormatter


def record(message: str = "request", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("router", logging.INFO, __file__, 1, message, None, None)
    made.fields = fields
    return made


def test_text_shows_the_message_and_then_the_values():
    line = TextFormatter().format(record(adapter="sql", tokens=3, finish=["length", "end_token"], error=None))
    assert line.split(" ", 1)[1] == "INFO request adapter=sql tokens=3 finish=length,end_token"


def test_json_has_the_values_beside_the_message():
    line = json.loads(JsonFormatter().format(record(adapter="sql", tokens=3, error=None)))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "info", "logger": "router", "message": "request", "adapter": "sql", "tokens": 3}


def test_a_value_cannot_forge_a_line_or_another_value():
    forged = "a\nINFO request outcome=finished \ud800"
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record(request_id=forged))
        line.encode()
        assert "\n" not in line
    assert json.loads(JsonFormatter().format(record(request_id=forged)))["request_id"] == forged


def test_an_exception_is_part_of_the_json():
    try:
        raise ValueError("broken")
    except ValueError:
        made = logging.LogRecord("router", logging.ERROR, __file__, 1, "failed", None, sys.exc_info())
    assert "ValueError: broken" in json.loads(JsonFormatter().format(made))["exception"]


def test_values_for_every_record_are_added_to_its_own():
    plain = logging.LogRecord("shard", logging.INFO, __file__, 1, "ready", None, None)
    staged = record("staged", lora_rank=4)
    for made in (plain, staged):
        assert Always({"rank": 1, "absent": None}).filter(made)
    assert TextFormatter().format(plain).endswith(" ready rank=1")
    assert TextFormatter().format(staged).endswith(" staged rank=1 lora_rank=4")


def test_libraries_only_log_when_something_is_wrong():
    code = """if True:
        import logging, warnings
        from loraplex.cli.logs import configure
        configure("json")
        logging.getLogger("http").info("GET https://hub/file?signature=secret")
        logging.getLogger("loraplex_shard.lora").info("staged")
        warnings.warn("the disk is nearly full")
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in result.stderr.splitlines()] == ["staged", "the disk is nearly full"]
