"""The application's routes and their description, without a service behind them."""

from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from serve_app.ingress.app import create_app


def bare_app() -> FastAPI:
    """The application; none of its routes can be called."""
    services: Any = SimpleNamespace(
        version="test",
        settings=SimpleNamespace(cors_origins=()),
        entropy=None,
        clock=None,
        request_metrics=None,
        is_behind_serve=False,
    )
    return create_app(services)


def openapi_document() -> dict[str, Any]:
    """Its OpenAPI document."""
    return bare_app().openapi()
