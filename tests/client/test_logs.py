"""The services' log lines: text for people or JSON for programs, and always one line, whatever a client sent."""

import json
import logging
import subprocess
import sys
from subprocess import PIPE

import grpc
import pytest

from loraplex.cli.logs import Always, JsonFormatter, TextFormatter, shorten


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


async def test_a_method_whose_name_is_not_a_text_costs_a_few_log_lines(caplog: pytest.LogCaptureFixture):
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(b"/a\xecb/c")(b"")
    await server.stop(None)
    records = [record for record in caplog.records if record.name.startswith("grpc") and record.exc_info]
    assert records
    for record in records:
        record.exc_text = None  # what another formatter has made of it
        assert shorten(record) and "\n" not in TextFormatter().format(record)


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


FLOOD = """if True:
    import logging, os, sys
    from loraplex.cli import log_writer
    from loraplex.cli.logs import configure
    log_writer.END_SECONDS = 0.1
    configure("json", rank=1)
    logger = logging.getLogger("loraplex")
    for number in range(50_000):
        logger.info("a line of some length, of which a pipe takes a few hundred: %d", number)
    print("goes on", flush=True)
    if sys.stdin.readline():
        log_writer.END_SECONDS = 60
        logging.shutdown()
        logger.info("later")
"""


def test_whoever_logs_does_not_wait_for_stderr_and_lines_that_are_dropped_are_counted():
    with subprocess.Popen([sys.executable, "-c", FLOOD], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "goes on\n"
        _, written = process.communicate("\n")
    *lines, later = map(json.loads, written.splitlines())
    (lost,) = (line for line in lines if line["level"] == "warning")
    numbers = [int(line["message"].rpartition(" ")[2]) for line in lines if line is not lost]
    assert numbers == list(range(len(numbers))) and numbers
    assert lost["message"] == f"{50_000 - len(numbers)} log lines are lost: they could not be written in time"
    assert (lost["rank"], later["message"]) == (1, "later")


def test_a_process_whose_stderr_nobody_reads_ends():
    with subprocess.Popen([sys.executable, "-c", FLOOD], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdin
        process.stdin.close()  # ends the process with an error, whose traceback
        assert process.stdout.readline() == "goes on\n"
        process.wait(60)


def test_forks_log_and_every_line_is_written_once():
    code = """if True:
        import logging, os
        from loraplex.cli.logs import configure
        configure("text")
        logger = logging.getLogger("loraplex")
        for number in range(50):
            logger.info("before %d", number)
            if os.fork() == 0:
                logger.info("fork %d", number)
                os._exit(0)
            os.wait()
        logger.info("after")
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = [line.partition("INFO ")[2] for line in result.stderr.splitlines()]
    assert sorted(said) == sorted(
        ["after", *(f"{where} {number}" for where in ("before", "fork") for number in range(50))]
    )
    assert said[-1] == "after"
