"""The routes of keys and accounts, and their page."""

from __future__ import annotations

from fastapi import APIRouter

from pyrosome.server.keys import account_routes, admin_routes
from pyrosome.server.page import file_sender

PAGE = "admin.html"
FILES = {"admin.css": "text/css; charset=utf-8", "admin.js": "text/javascript; charset=utf-8"}


def router() -> APIRouter:
    """The API, and at `/admin` and `/account` the page that calls it; the page itself knows nothing."""
    routes = APIRouter()
    routes.include_router(account_routes.router())
    routes.include_router(admin_routes.router())
    for path in ("/admin", "/account"):
        route = file_sender(PAGE, "text/html; charset=utf-8")
        routes.add_api_route(path, route, methods=["GET", "HEAD"], include_in_schema=False)
    for name, kind in FILES.items():
        routes.add_api_route(f"/ui/{name}", file_sender(name, kind), methods=["GET", "HEAD"], include_in_schema=False)
    return routes
