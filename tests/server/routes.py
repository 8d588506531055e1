"""Every route of an app, however deep FastAPI keeps it."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from quickchange_adapters.api_keys import KeyScope
from quickchange_server.api.scoped_route import ScopedRoute

_PARAMETER = re.compile(r"\{(\w+)(:\w+)?\}")
_EXAMPLES = {"version": "1", "file": "task.json"}


@dataclass(frozen=True)
class FoundRoute:
    """One method of one route; `scope` None: open to all, or for any key."""

    method: str
    template: str
    route: object

    @property
    def path(self) -> str:
        """A path that leads there."""
        return _PARAMETER.sub(lambda match: _EXAMPLES.get(match[1], "ada"), self.template)

    @property
    def needs_key(self) -> bool:
        return isinstance(self.route, ScopedRoute) and self.route.needs is not None

    @property
    def scope(self) -> KeyScope | None:
        needs = self.route.needs if isinstance(self.route, ScopedRoute) else None
        return None if needs is None else needs.scope

    def __str__(self) -> str:
        return f"{self.method} {self.template}"


def routes_of(app: FastAPI) -> list[FoundRoute]:
    """Return all routes of an app."""
    return list(_walk(app.routes))


def _walk(routes: Iterable[Any]) -> Iterator[FoundRoute]:
    for route in routes:
        if hasattr(route, "original_router"):
            yield from _walk(route.original_router.routes)
        else:
            for method in sorted(route.methods):
                yield FoundRoute(method, route.path, route)
