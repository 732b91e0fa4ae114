"""POST /invocations: how SageMaker calls any model. The body says which route is meant."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_router.text.json_limits import parse_body

PATH = "/invocations"  # by itself, LoRAX's route
ROUTES = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}  # by a field


class Invocations:
    """An ASGI middleware. Sends requests with OpenAI's bodies to OpenAI's routes, as vLLM does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != PATH or scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        messages, refusal = list[Message](), list[HTTPException]()
        try:
            while not messages or messages[-1].get("more_body"):
                messages.append(await receive())
        except HTTPException as error:  # the route is to answer it
            refusal.append(error)

        async def again() -> Message:
            if messages:
                return messages.pop(0)
            if refusal:
                raise refusal.pop()
            return await receive()

        path = await _route(b"".join(message.get("body", b"") for message in messages))
        await self._app({**scope, "path": path, "raw_path": path.encode()}, again, send)


async def _route(body: bytes) -> str:
    try:
        sent = await parse_body(body)
    except ValueError:  # the route says what is wrong
        return PATH
    named = (path for field, path in ROUTES.items() if isinstance(sent, dict) and field in sent)
    return next(named, PATH)
