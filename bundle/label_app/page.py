"""The pages of the label server: one to drop an MR on, at ``/``, and the description of its API, at ``/docs``.

They load nothing from elsewhere.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from monailabel.interfaces.app import MONAILabelApp
from monailabel.utils.others.generic import remove_file
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from bundle.label_app.infer import MADE, SD
from bundle.label_app.studies import NotFound, check_volume_file
from bundle.pages.niivue import MISSING, packed_script
from bundle.pages.render import render
from custom_modules import bundle_version
from custom_modules.data.volumes import read_volume, write_volume

LIMIT = 1_500_000_000  # bytes of a request; a whole body at 1 mm has a third of that
MR = "mr.nii.gz"
OHIF = "OHIF shows the studies of a DICOM server. This server has a folder of files: use the page at / or 3D Slicer."


class LimitUpload:
    """Refuses a request whose header says that it is larger than ``limit`` bytes, before anything of it is read."""

    def __init__(self, app: ASGIApp, limit: int = LIMIT) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if scope["type"] == "http" and length.isdigit() and int(length) > self.limit:
            detail = f"the request has {int(length) / 1e9:.1f} GB, more than {self.limit / 1e9:.1f}; send a smaller MR"
            response = JSONResponse({"detail": detail}, 413, headers={"Connection": "close"})
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def add_pages(server: FastAPI, app: MONAILabelApp) -> None:
    """Add the pages to MONAI Label's server, in place of those that need the internet, and the limit on requests."""
    server.user_middleware.append(Middleware(LimitUpload))

    async def index() -> HTMLResponse:
        return HTMLResponse(_index(app))

    async def docs() -> HTMLResponse:
        return HTMLResponse(render("api.html", title="API", calls=calls(server.openapi()), with_viewer=False))

    async def ohif(path: str = "") -> HTMLResponse:
        return HTMLResponse(render("message.html", title="OHIF", text=OHIF, with_viewer=False))

    async def volume(session_id: str = "", image: str = "", what: str = MR) -> FileResponse:
        path = await run_in_threadpool(file_for, app, session_id, image, what)
        after = None if session_id else BackgroundTask(remove_file, str(path.parent))
        return FileResponse(path, media_type="application/gzip", filename=what, background=after)

    for path, endpoint in (("/", index), ("/docs", docs), ("/ohif/{path:path}", ohif)):
        server.add_api_route(path, endpoint, include_in_schema=False)
        server.router.routes.insert(0, server.router.routes.pop())  # the first that fits is taken
    server.add_api_route("/volume", volume, summary="MR, or SD of a session, as NIfTI", tags=["Infer"])


def _index(app: MONAILabelApp) -> str:
    options = app._infers["synthetic_ct"].config()
    return render(
        "server.html", title="Synthetic CT from MR", version=bundle_version(), limit=LIMIT, connect="'self' data:",
        samples=options["num_samples"], seed=options["seed"], missing="" if packed_script() else MISSING,
    )  # fmt: skip


def file_for(app: MONAILabelApp, session_id: str, image: str, what: str) -> Path:
    """Return a file of a session, or the MR ``image`` of the studies folder, as NIfTI.

    Raises:
        NotFound: when there is no such session, image or file.
    """
    if what not in (MR, SD):
        raise NotFound(f"no file '{what}'; there are {MR} and {SD}")
    session = app.sessions().get_session(session_id) if session_id else None
    if session_id and session is None:
        raise NotFound(f"no session '{session_id}'; sessions are removed after an hour")
    if session:
        path = Path(session.path) / MADE / what
        if what == MR and not path.is_file():
            write_volume(read_volume(check_volume_file(session.image)["image"]), path)
        if not path.is_file():
            raise NotFound(f"the session has no {what}; ask for two samples or more")
        return path
    if what != MR:
        raise NotFound("the SD of an image of the studies folder is its label 'uncertainty'")
    path = Path(tempfile.mkdtemp(prefix="result", dir=app.temporary)) / what
    write_volume(read_volume(check_volume_file(app.datastore().resolve(image)[1])["image"]), path)
    return path


def calls(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the calls of an OpenAPI description: method, path, summary and parameters, by tag."""
    found = []
    for path, methods in schema["paths"].items():
        for method, call in methods.items():
            parameters = [
                {"name": p["name"], "place": p["in"], "required": p.get("required", False),
                 "default": p.get("schema", {}).get("default", "")}
                for p in call.get("parameters", [])
            ]  # fmt: skip
            bodies = [body.get("schema", {}) for body in call.get("requestBody", {}).get("content", {}).values()]
            for body in bodies:
                named = schema["components"]["schemas"].get(body.get("$ref", "").rsplit("/", 1)[-1], body)
                parameters += [
                    {"name": name, "place": "body", "required": name in named.get("required", []),
                     "default": value.get("default", "")}
                    for name, value in named.get("properties", {}).items()
                ]  # fmt: skip
            found.append({
                "tag": (call.get("tags") or ["Others"])[0], "method": method.upper(), "path": path,
                "summary": call.get("summary", ""), "parameters": parameters,
            })  # fmt: skip
    return sorted(found, key=lambda call: call["tag"])
