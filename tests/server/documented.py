"""Compares every answer that a test gets with what OpenAPI says the route can answer."""

import re
from typing import Any

import httpx
from fastapi import FastAPI
from quickchange_server.api.documentation import describe

Documented = list[tuple[re.Pattern[str], dict[str, dict[str, Any]]]]
_known: dict[str, Documented] = {}
"""What apps of one title answer; to describe one anew for each test would take too long."""


class DocumentedAnswers:
    """Checks an app's answers; a status that is not documented fails the test that got it."""

    def __init__(self, app: FastAPI) -> None:
        if app.title not in _known:
            paths = describe(app)["paths"]
            _known[app.title] = [(_pattern(path), methods) for path, methods in paths.items()]
        self._paths = _known[app.title]

    async def check(self, answer: httpx.Response) -> None:
        """Compare one answer; paths and methods that are no routes are left alone."""
        method, path = answer.request.method.lower(), answer.request.url.path
        for pattern, methods in self._paths:
            if method in methods and pattern.fullmatch(path):
                known = methods[method]["responses"]
                assert str(answer.status_code) in known, f"{method} {path}: {answer.status_code}"
                return


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    groups = [".+" if name == "model_id" else "[^/]+" for name in parts[1::2]]
    texts = [re.escape(text) for text in parts[::2]]
    return re.compile("".join(t + g for t, g in zip(texts, [*groups, ""], strict=True)))
