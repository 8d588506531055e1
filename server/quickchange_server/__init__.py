"""Quickchange server: REST API, engine, metrics and configuration."""

__version__ = "0.1.0"
