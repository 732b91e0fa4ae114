"""Renders conversations with chat templates, in separate processes: see template_process.py.

A template is a program, a conversation can be long, and anyone who can name an adapter can provide a template: none of
this may block the event loop, fill the router's memory, or let others wait.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

import orjson

from loraplex_protos.errors import (
    AdapterInvalidError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from loraplex_router.text.fair_lock import FairLock, Turn
from loraplex_router.vocabulary.chat import FIELD, Chat, ChatTemplates, RenderedChat

logger = logging.getLogger(__name__)

QUICK_SECONDS = 0.25  # of CPU time: nearly all conversations take less
RENDER_SECONDS = 5.0  # of CPU time: far more than any legitimate template takes, however busy the machine
SLOW_NICENESS = 5  # what takes long leaves most of a busy processor to the shards and to quick conversations
MOST_SLOW = 8  # slow conversations of a tenant that may wait for the same template
STARTS = 3  # on a machine that is short of memory, a process may end before it is ready
ANSWER_SECONDS = 60  # of wall-clock time: in case the process gets no CPU time at all
START_SECONDS = 120  # of wall-clock time, in which it imports its libraries, maybe from a slow disk
KILLED_SECONDS = 5  # for which a process is waited for that was killed: a disk that hangs may keep it for ever
READY = b"ready\n"
LONG = 2**18  # bytes; longer conversations take noticeable time
# transformers imports numpy, which needs no threads here; and the warning about missing torch is silenced.
QUIET = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TZ")  # environment variables; templates ask for the date

Answer: TypeAlias = tuple[str, str, str]  # see template_process.answer
SLOW: Answer = "slow", "", ""
REFUSED: Answer = "refused", "the server is shutting down", ""


class Renderer:
    """Two processes for the model's own templates and two for adapters': a quick one, and one for conversations that
    are long or that the quick one gave up. Each is shared fairly among tenants and their templates, so others wait for
    QUICK_SECONDS at most, whatever a template does. A process starts on first use."""

    def __init__(self, own: ChatTemplates, render_seconds: float = RENDER_SECONDS) -> None:
        self._own = own
        self._quick, self._quick_foreign = (_Process(min(QUICK_SECONDS, render_seconds)) for _ in range(2))
        self._slow, self._slow_foreign = (_Process(render_seconds, SLOW_NICENESS) for _ in range(2))

    async def render(self, templates: ChatTemplates, chat: Chat, tenant: str = "") -> RenderedChat:
        """Raises InvalidRequestError if there is no template, or if it rejects the messages, cannot be parsed or takes
        too long; AdapterInvalidError if an adapter's cannot be parsed; OverloadedError if too many slow conversations
        of the tenant wait for this template; UnavailableError if the process does not start."""
        question, source = _write(templates, chat), templates.choose(bool(chat.tools))
        own = templates == self._own
        quick, slow = (self._quick, self._slow) if own else (self._quick_foreign, self._slow_foreign)
        kind, text, turn_end = SLOW
        if len(question) <= LONG:
            kind, text, turn_end = await quick.ask(question, tenant, source)
            if kind == "slow" and slow.lock.count_waiting(tenant, source) >= MOST_SLOW:
                raise OverloadedError(f"{MOST_SLOW} conversations wait for this chat template, which takes long")
        if kind == "slow":
            kind, text, turn_end = await slow.ask(question, tenant, source)
        if kind == "text":
            return RenderedChat(text, turn_end)
        if kind == "slow":
            raise _invalid("rendering them with the chat template takes too much time or memory")
        if kind == "broken" and not own:
            raise AdapterInvalidError(f"the adapter's chat template cannot be parsed: {text}")
        raise _invalid(f"the model's chat template cannot be parsed: {text}" if kind == "broken" else text)

    async def check(self) -> None:
        """Logs why the model's own templates cannot be parsed, if so. Also starts the process before the first
        conversation."""
        for name, source in self._own.by_name.items():
            try:
                kind, text, _ = await self._quick.ask(_write_question(source, self._own.special_tokens), "", source)
            except UnavailableError:
                return  # it is logged
            if kind == "broken":
                logger.warning("chats will be refused: the model's chat template %r cannot be parsed: %s", name, text)

    async def aclose(self) -> None:
        """Ends the processes. Pending and later questions are refused."""
        processes = self._quick, self._slow, self._quick_foreign, self._slow_foreign
        await asyncio.gather(*(process.aclose() for process in processes))


class _Process:
    """Answers one question at a time."""

    def __init__(self, render_seconds: float, niceness: int = 0) -> None:
        self._arguments = str(render_seconds), str(niceness)
        self._process: asyncio.subprocess.Process | None = None
        self._asked: asyncio.Task[Answer] | None = None
        self._closed = False
        self.lock = FairLock()

    async def ask(self, question: bytes, tenant: str, source: str) -> Answer:
        """Asks in turn. `source`: the template. Cancelling one caller does not end the process for the others."""
        turn = await self.lock.acquire(tenant, source)
        self._asked = asyncio.create_task(self._answer(question, turn))
        return await asyncio.shield(self._asked)

    async def aclose(self) -> None:
        self._closed = True
        self._kill()
        if self._asked is not None:
            await asyncio.gather(self._asked, return_exceptions=True)
        await self._end()

    async def _answer(self, question: bytes, turn: Turn) -> Answer:
        try:
            if self._closed:
                return REFUSED
            if self._process is not None and _is_gone(self._process):
                await self._end()
            process = self._process or await self._start()
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await _exchange(process, question)
            except (TimeoutError, OSError, EOFError):  # EOFError: it died
                await self._end()
                return SLOW
        except Exception as error:  # the system cannot start a process, or the event loop lost one
            await self._end()
            if self._closed:
                return REFUSED
            logger.exception("the process that renders chat templates failed")
            raise UnavailableError("chat templates cannot be rendered at the moment: try again") from error
        finally:
            self.lock.release(turn)

    async def _start(self) -> asyncio.subprocess.Process:
        """Returns the process once it is ready."""
        for _ in range(STARTS):
            self._process = process = await _spawn(self._arguments)
            if self._closed:  # meanwhile
                break
            assert process.stdout
            async with asyncio.timeout(START_SECONDS):
                async for line in process.stdout:
                    if line == READY:
                        return process
            await self._end()
        raise OSError("it exited before it was ready")

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _end(self) -> None:
        """Ends the process when nobody waits for its answer. The next question starts another."""
        self._kill()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILLED_SECONDS):
                    await process.communicate()


def _is_gone(process: asyncio.subprocess.Process) -> bool:
    """Whether it exited, or was killed, since its last answer."""
    return process.returncode is not None or (process.stdin is not None and process.stdin.is_closing())


async def _exchange(process: asyncio.subprocess.Process, question: bytes) -> Answer:
    assert process.stdin and process.stdout
    process.stdin.write(question + b"\n")
    await process.stdin.drain()
    head = json.loads(await process.stdout.readuntil())
    text = (await process.stdout.readexactly(head["bytes"])).decode()
    return head["kind"], text, head["turn_end"]


async def _spawn(arguments: tuple[str, ...]) -> asyncio.subprocess.Process:
    """Starts the process with a minimal environment."""
    environment = {**{name: os.environ[name] for name in KEPT if name in os.environ}, **QUIET}
    pipe = asyncio.subprocess.PIPE
    command = sys.executable, "-P", "-m", "loraplex_router.text.template_process", *arguments
    return await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True
    )


def _write(templates: ChatTemplates, chat: Chat) -> bytes:
    try:
        return _write_question(
            templates.choose(bool(chat.tools)),
            templates.special_tokens,
            messages=[{"role": m.role, "content": m.content, **m.fields} for m in chat.messages],
            tools=chat.tools or None,
            documents=chat.documents,
            variables=chat.variables,
            add_generation_prompt=chat.generation_prompt,
            continue_final_message=chat.continue_final_message,
        )
    except RecursionError as error:
        raise _invalid("they are nested too deeply") from error


def _write_question(source: str, special_tokens: Mapping[str, str], **conversation: Any) -> bytes:
    question = {"source": source, "special_tokens": special_tokens, **conversation}
    try:
        return orjson.dumps(question)
    except TypeError:  # an integer of more than 64 bits, or deep nesting
        return json.dumps(question).encode()


def _invalid(description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(FIELD, description))
