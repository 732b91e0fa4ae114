"""Renders the chat templates that adapters bring along, in a process of its own.

Whoever can name an adapter can bring a template, and the sandbox does not keep one from running forever or filling the
memory: the process is short of memory, and of processor time for each template. It starts with the first such template.
Run as a program, this file is that process: a line of JSON in, a line of JSON out.
"""

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from loraplex_protos.errors import AdapterInvalidError, FieldViolation, InvalidRequestError
from loraplex_router.text.chat import FIELD, Chat, ChatTemplate, Message, RenderedChat

RENDER_SECONDS = 5.0  # of processor time: many times what any template of good will takes, however busy the machine
ANSWER_SECONDS = 60  # by the clock: on a machine that gives the process no time at all
MEMORY_BYTES = 2**30
MAX_LINE = 2**26
MAX_RENDERED = 2**24  # characters
KEPT = 256  # compiled templates

Row = dict[str, Any]


class ForeignTemplates:
    """One process for all of them: who waits for a slow template waits with others that bring one."""

    def __init__(self, bos_token: str, eos_token: str, render_seconds: float = RENDER_SECONDS) -> None:
        self._render_seconds = render_seconds
        self._tokens = bos_token, eos_token
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def render(self, template: str, chat: Chat) -> RenderedChat:
        """Raises InvalidRequestError if the template refuses the messages or takes too long, AdapterInvalidError if it
        is no template."""
        question = json.dumps({"template": template, "tokens": self._tokens, "chat": asdict(chat)})
        async with self._turn:
            answer = await self._ask(question)
        if "broken" in answer:
            raise AdapterInvalidError(f"the adapter's chat template cannot be read: {answer['broken']}")
        if "refusal" in answer:
            raise InvalidRequestError(FieldViolation(FIELD, answer["refusal"]))
        return RenderedChat(answer["text"])

    async def aclose(self) -> None:
        """Ends the process. The next call starts another."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def _ask(self, question: str) -> Row:
        try:
            if self._process is None:
                self._process = await _start(self._render_seconds)
            assert self._process.stdin
            self._process.stdin.write(question.encode() + b"\n")
            return await self._read_answer()
        except (TimeoutError, OSError, ValueError):  # ValueError: it died, or its line is too long
            await self.aclose()
            return {"refusal": "the adapter's chat template takes too much time or memory to render them"}
        except BaseException:  # its answer would be taken for the next one's
            await self.aclose()
            raise

    async def _read_answer(self) -> Row:
        assert self._process and self._process.stdout
        async with asyncio.timeout(ANSWER_SECONDS):
            answer: Row = json.loads(await self._process.stdout.readline())
        return answer


async def _start(render_seconds: float) -> asyncio.subprocess.Process:
    """With no more of the environment than Python needs."""
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    pipe = asyncio.subprocess.PIPE
    command = sys.executable, "-m", __name__, str(render_seconds)
    return await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, limit=MAX_LINE, env=environment, start_new_session=True
    )


# ---- in the process --------------------------------------------------------------------------------------------


def main() -> None:
    """A template that uses up its time ends the process, also when no router is left to wait for it."""
    render_seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    compiled = lru_cache(KEPT)(ChatTemplate)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, render_seconds)
        question = json.loads(line)
        try:
            template = compiled(question["template"], *question["tokens"])
        except Exception as error:  # a template can be too deep for the parser
            answer = {"broken": f"{type(error).__name__}: {error}"[:500]}
        else:
            answer = _render(template, question["chat"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _render(template: ChatTemplate, given: Row) -> Row:
    messages = tuple(Message(**message) for message in given.pop("messages"))
    try:
        text = template.render(Chat(messages, **given))
    except InvalidRequestError as error:
        return {"refusal": error.violations[0].description}
    return (
        {"text": text} if len(text) <= MAX_RENDERED else {"refusal": "the chat template makes too long a text of them"}
    )


if __name__ == "__main__":
    main()
