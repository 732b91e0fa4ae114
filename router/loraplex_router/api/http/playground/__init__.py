"""The playground: a page at / that calls the other faces from a browser."""

from loraplex_router.api.http.errors import write_lorax_error
from loraplex_router.api.http.face import Face
from loraplex_router.api.http.playground import routes

FACE = Face(prefix="", routers=(routes.router,), write_error=write_lorax_error)
