"""The playground's files. The page loads nothing from elsewhere, and runs nothing that is not in these files."""

from pathlib import Path

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import HTMLResponse

from loraplex_router.api.http.call import Call
from loraplex_router.api.http.health import UNHEALTHY, answer_health

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = {
    path.name: (path.read_bytes(), TYPES[path.suffix])
    for path in (Path(__file__).parent / "page").iterdir()
    if path.suffix in TYPES
}

POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",  # no text becomes HTML
    "trusted-types 'none'",
)
HEADERS = {
    "Content-Security-Policy": "; ".join(POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of the server has a new page
}

router = APIRouter()


@router.get("/", tags=["LoRAX"], response_class=HTMLResponse, responses=UNHEALTHY)
async def show_page(call: Call) -> Response:
    """Like /health, with the playground as its page."""
    return _file("index.html") if call.service.healthy else answer_health(call.service)


@router.get("/playground/{name}", include_in_schema=False)
async def show_file(name: str) -> Response:
    """One of the page's files."""
    if name not in FILES:
        raise HTTPException(404, "Not Found")
    return _file(name)


def _file(name: str) -> Response:
    content, media_type = FILES[name]
    return Response(content, media_type=media_type, headers=HEADERS)
