"""`/docs` and `/openapi.json`: for whoever has a key, once there are keys."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse

from quickchange_server.api.auth import AnyKey
from quickchange_server.api.route_answers import SCHEMAS, complete
from quickchange_server.api.scoped_route import ScopedRoute

OPENAPI_PATH = "/openapi.json"
# With it FastAPI does not add the 422 and the body of its own, which nothing here answers.
NO_FRAMEWORK_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"description": "Refused"}}

router = APIRouter(include_in_schema=False, route_class=ScopedRoute)


def describe(app: FastAPI) -> dict[str, Any]:
    """Return OpenAPI's description of an app, with every answer of every route; made once."""
    if app.openapi_schema is None:
        schema = app.openapi()
        complete(schema["paths"])
        schema.setdefault("components", {}).setdefault("schemas", {}).update(SCHEMAS)
    assert app.openapi_schema is not None
    return app.openapi_schema


@router.head(OPENAPI_PATH)
@router.get(OPENAPI_PATH)
async def openapi(request: Request, caller: AnyKey) -> dict[str, Any]:
    """Describe every route."""
    return describe(request.app)


@router.head("/docs")
@router.get("/docs")
async def docs(request: Request, caller: AnyKey) -> HTMLResponse:
    """Show the description as a page."""
    return get_swagger_ui_html(openapi_url=OPENAPI_PATH, title=request.app.title)
