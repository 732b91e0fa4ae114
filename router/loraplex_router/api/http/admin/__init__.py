"""Administration's face: adapters are listed, loaded, unloaded and pinned."""

from loraplex_router.api.http.admin import routes
from loraplex_router.api.http.errors import write_lorax_error
from loraplex_router.api.http.face import Face

FACE = Face(prefix="/adapters", routers=(routes.router,), write_error=write_lorax_error)
