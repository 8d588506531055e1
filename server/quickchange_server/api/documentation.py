"""`/docs` and `/openapi.json`: for whoever has a key, once there are keys."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse

from quickchange_server.api.auth import AnyKey
from quickchange_server.api.scoped_route import ScopedRoute

OPENAPI_PATH = "/openapi.json"
_TEXT, _TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT},
}
_ERROR_BODY = {"type": "object", "required": ["error"], "properties": {"error": _ERROR}}
# With "4XX" FastAPI does not add the 422 and the body of its own, which nothing here answers.
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "Refused, with the reason",
        "content": {"application/json": {"schema": _ERROR_BODY}},
    }
}

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
