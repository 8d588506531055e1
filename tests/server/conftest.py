"""Fixtures of the HTTP edge: a scripted engine, alone and behind an app."""

import pytest

from tests.server.scripted_engine import ScriptedEngine


@pytest.fixture
def scripted_engine() -> ScriptedEngine:
    """Return a fresh scripted engine, not yet started."""
    return ScriptedEngine()
