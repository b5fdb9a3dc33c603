"""An application for the browser: a folder with a page, and routes under `/api/` that answer guests alone.

    people = Invited()
    application = site(Path("page"), [Route("/api/question", question)], Rules(address.hosts(), "leyden", people))
    serve(application, address, [f"open {address.link(people.invite('me'))}"])

Somebody's link holds their token behind `#`, which browsers keep to themselves. The page's script takes it out of the
address and shows it once, by POST to `/api/enter`; from then on a cookie says who asks, and routes read
`request.scope["person"]`.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from leyden.web.guard import Guard, Rules, TooLong, refused
from leyden.web.guests import whose

SHARED = Path(__file__).parent / "page"
"""What the pages of several commands load, from `/shared/`."""
A_YEAR = 365 * 24 * 3600


def site(folder: Path, routes: Sequence[BaseRoute], rules: Rules) -> ASGIApp:
    """An application with a page.

    Args:
        folder: index.html, and what it loads from `/page/`.
        routes: of the application's own, under `/api/`.
        rules: who may come in, and how often.
    """
    for ending, kind in ((".js", "text/javascript"), (".css", "text/css"), (".svg", "image/svg+xml")):
        mimetypes.add_type(kind, ending)  # some systems call a script text/plain, which browsers then refuse

    async def enter(request: Request) -> Response:
        token = str((await read_json(request)).get("token", ""))
        person = await run_in_threadpool(lambda: whose(token, rules.guests()))
        if person is None:
            return refused("token")
        response = JSONResponse({"person": person})
        secure = rules.is_https
        response.set_cookie(rules.cookie, token, max_age=A_YEAR, secure=secure, httponly=True, samesite="strict")
        return response

    async def page(request: Request) -> Response:
        return FileResponse(folder / "index.html")

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": "request", "text": error.detail}, error.status_code)

    async def too_long(request: Request, error: Exception) -> Response:
        return refused("big")

    own = [
        Route("/", page),
        Route("/api/enter", enter, methods=["POST"]),
        Mount("/page", StaticFiles(directory=folder)),
        Mount("/shared", StaticFiles(directory=SHARED)),
    ]
    app = Starlette(routes=[*own, *routes], exception_handlers={HTTPException: failed, TooLong: too_long})
    return Guard(app, rules)


async def read_json(request: Request) -> dict[str, Any]:
    """The object that a request sends, with ? for halves of characters. Raises `HTTPException` 400 where it is none."""
    try:
        body = json.loads(await request.body())
        body = json.loads(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise HTTPException(400, "send a JSON object")
    return body
