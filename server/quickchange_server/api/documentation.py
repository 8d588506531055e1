"""`/docs` and `/openapi.json`: for whoever has a key, once there are keys."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse

from quickchange_server.api.auth import AnyKey
from quickchange_server.api.scoped_route import ScopedRoute

OPENAPI_PATH = "/openapi.json"

router = APIRouter(include_in_schema=False, route_class=ScopedRoute)


@router.get(OPENAPI_PATH)
async def openapi(request: Request, caller: AnyKey) -> dict[str, Any]:
    """Describe every route."""
    app: FastAPI = request.app
    return app.openapi()


@router.get("/docs")
async def docs(request: Request, caller: AnyKey) -> HTMLResponse:
    """Show the description as a page."""
    return get_swagger_ui_html(openapi_url=OPENAPI_PATH, title=request.app.title)
