"""Python client of the Quickchange server."""
