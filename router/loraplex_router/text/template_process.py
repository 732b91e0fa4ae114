"""The process that renders chat templates. It reads lines of JSON, and answers each with a line of JSON and a text.

The sandbox does not keep a template from running forever or filling the memory, so this process has little memory, and
little processor time for each conversation. renderer.py starts it.
"""

import json
import os
import resource
import signal
import sys
from functools import lru_cache

import jinja2

from loraplex_router.text.template import Template

MEMORY_BYTES = 2**30
MAX_RENDERED = 2**24  # characters
MAX_TURN_END = 200
MAX_REASON = 200  # characters: it may quote the conversation
KEPT = 256  # number of templates that are kept, with their traits
GRACE_SECONDS = 1.0  # after its time: a template that spends that long in one function of C ends the process


class OutOfTime(BaseException):
    """The conversation has used up its time. Not an Exception, since templates' errors are caught."""


def main() -> None:
    """Reports that it is ready, and answers."""
    for number in signal.SIGINT, signal.SIGTERM:  # may be sent to all processes; a router that drains still renders
        signal.signal(number, signal.SIG_IGN)
    render_seconds = float(sys.argv[1])
    os.nice(int(sys.argv[2]))
    signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that a library's output is not taken for an answer
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        try:
            signal.setitimer(signal.ITIMER_PROF, render_seconds)
            signal.setitimer(signal.ITIMER_VIRTUAL, render_seconds + GRACE_SECONDS)
            kind, text, turn_end = answer(line)
            signal.setitimer(signal.ITIMER_PROF, 0)
        except OutOfTime:
            kind, text, turn_end = "slow", "", ""
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        data = text.encode(errors="replace")
        head = {"kind": kind, "bytes": len(data), "turn_end": turn_end[:MAX_TURN_END]}
        answers.write(json.dumps(head).encode() + b"\n" + data)
        answers.flush()


def _stop(*_: object) -> None:
    raise OutOfTime


def answer(line: bytes) -> tuple[str, str, str]:
    """("text", the prompt, the text that the template writes after an answer), ("refused", the reason, "") or
    ("broken", the template's error, ""). `main` adds ("slow", "", "").

    A question without messages asks whether the template can be parsed.
    """
    try:
        question = json.loads(line)
    except (ValueError, RecursionError):
        return "refused", "they are nested too deeply", ""
    try:
        template = _template(question.pop("source"), tuple(sorted(question.pop("special_tokens").items())))
    except Exception as error:  # a template may be nested too deeply for the parser
        return "broken", describe(error), ""
    if "messages" not in question:
        return "text", "", template.turn_end
    try:
        text = template.render(**question)
    except Exception as error:  # it is a program
        return "refused", f"the chat template refuses them: {describe(error)}", ""
    if len(text) > MAX_RENDERED:
        return "refused", "the chat template makes too long a text of them", ""
    return "text", text, template.turn_end


def describe(error: Exception) -> str:
    """A template's own error is passed on unchanged."""
    reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    line = getattr(error, "lineno", None)
    return (f"line {line}: {reason}" if line else reason)[:MAX_REASON]


@lru_cache(KEPT)
def _template(source: str, special_tokens: tuple[tuple[str, str], ...]) -> Template:
    return Template(source, dict(special_tokens))


if __name__ == "__main__":
    main()
