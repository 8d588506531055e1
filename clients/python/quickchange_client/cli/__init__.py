"""The `quickchange` command. Everything it does goes through the client's public methods."""

from quickchange_client.cli.application import app, main

__all__ = ["app", "main"]
