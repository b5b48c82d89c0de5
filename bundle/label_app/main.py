"""MONAI Label app: synthetic CT for 3D Slicer and other clients, and fine-tuning on the server's own pairs.

monailabel start_server --app bundle/label_app --studies DIR --host 127.0.0.1
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelException
from monailabel.utils.others.generic import remove_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the server loads this file by its path

from bundle.label_app.infer import Synthesis  # noqa: E402
from bundle.label_app.page import add_pages  # noqa: E402
from bundle.label_app.studies import CheckedSessions, NotFound, Studies  # noqa: E402
from bundle.label_app.train import FineTuning  # noqa: E402
from bundle.workflow import ROOT  # noqa: E402
from custom_modules.errors import InputError  # noqa: E402

logger = logging.getLogger(__name__)

MODEL = "synthetic_ct"
CLOCK_ERROR = 0.2  # s; what MONAI Label imports before it makes a folder takes longer
STALE = 3600  # seconds after which a temporary file is no longer needed


class SyntheticCTApp(MONAILabelApp):
    """App with one model, ``synthetic_ct``. Its own files are in ``DIR/synthetic_ct``: the weights and the
    record of training, sessions, and temporary files.

    ``--conf checkpoint PATH`` uses other weights than the bundle's.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        if "://" in studies:
            raise InputError(f"{studies}: the studies must be a folder; DICOMweb and other servers are not supported")
        refuse_new_folder(Path(studies))
        self.folder = Path(studies).resolve() / MODEL
        self.temporary = self.folder / "tmp"
        self.shipped = Path(conf.get("checkpoint", ROOT / "models" / "model.pt"))
        settings.MONAI_LABEL_SESSION_PATH = str(self.folder / "sessions")
        metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())
        super().__init__(
            app_dir, studies, conf, name="Synthetic CT from MR", description=metadata["description"],
            version=metadata["version"],
        )  # fmt: skip

    def checkpoint(self) -> Path:
        """Return the current weights: those of the last training or upload, otherwise the bundle's."""
        own = self.folder / "model.pt"
        return own if own.is_file() else self.shipped

    def init_datastore(self) -> Studies:
        auto_reload, read_only = settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD, settings.MONAI_LABEL_DATASTORE_READ_ONLY
        return Studies(self.studies, auto_reload=auto_reload, read_only=read_only)

    def init_infers(self) -> dict[str, Synthesis]:
        return {MODEL: Synthesis(self._datastore, self.checkpoint)}

    def init_trainers(self) -> dict[str, FineTuning]:
        return {MODEL: FineTuning(self.folder / "model.pt", self.checkpoint)}

    def _load_sessions(self, load: bool = False) -> CheckedSessions | None:
        return CheckedSessions(settings.MONAI_LABEL_SESSION_PATH, settings.MONAI_LABEL_SESSION_EXPIRY) if load else None

    def on_init_complete(self) -> None:
        """Set up what only the server needs, not its training processes: an empty folder for temporary files, a
        response to every error, and no access for pages of other sites."""
        from monailabel.app import CORSMiddleware
        from monailabel.app import app as server

        remove_file(str(self.temporary))
        self.temporary.mkdir(parents=True)
        tempfile.tempdir = str(self.temporary)
        for error in (InputError, MONAILabelException, json.JSONDecodeError, HTTPException, Exception):
            server.add_exception_handler(error, refuse)
        server.user_middleware = [entry for entry in server.user_middleware if entry.cls is not CORSMiddleware]
        add_pages(server, self)
        server.middleware_stack = server.build_middleware_stack()  # built before the app was made
        super().on_init_complete()

    def check_model(self, model: str | None) -> None:
        """Raise NotFound unless there is such a model."""
        if model not in self._infers:
            raise NotFound(f"no model '{model}'; there is {', '.join(self._infers)}")

    def infer(self, request: dict[str, Any], datastore: Studies | None = None) -> dict[str, Any]:
        self.check_model(request.get("model"))
        file, params = self._infers[request["model"]](request)
        return {"label": file, "file": file, "tag": request.get("label_tag"), "params": params}

    infer_wsi = infer

    def batch_infer(self, request: dict[str, Any], datastore: Studies | None = None) -> dict[str, Any]:
        """Run MONAI Label's batch inference, which without this divides by the number of GPUs even if it is zero."""
        return super().batch_infer({**request, "multi_gpu": torch.cuda.is_available()}, datastore)

    def bundle_path(self, model: str | None) -> str | None:
        """Refuse an unknown model. The server calls this last before a task goes to the background, where no response
        can report it."""
        if model is not None:
            self.check_model(model)
        return None

    def model_file(self, model: str, validate: bool = True) -> str | None:
        """Return the weights that clients may load, replace and delete: the app's own, never the bundle's."""
        self.check_model(model)
        own = self.folder / "model.pt"
        return str(own) if own.is_file() or not validate else None

    def cleanup_sessions(self) -> None:
        super().cleanup_sessions()
        for path in self.temporary.iterdir():
            with suppress(FileNotFoundError):  # its request has just ended
                if path.stat().st_mtime < time.time() - STALE:
                    remove_file(str(path))


def refuse_new_folder(studies: Path) -> None:
    """Remove the studies folder if it is empty and younger than this process: MONAI Label makes a folder of any name
    that it does not find, before this app is asked.

    Raises:
        InputError: when it was.
    """
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])  # psutil rounds to a second
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    younger = studies.is_dir() and studies.stat().st_ctime > time.time() - age + CLOCK_ERROR
    if younger and not any(studies.iterdir()):
        studies.rmdir()
        raise InputError(f"{studies}: no such folder; correct --studies, or make the folder first")


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Respond to an error: 4xx and one sentence if the client can correct it. Files uploaded with the request are
    removed; these are the only ones, because MONAI Label handles requests one after another in its event loop."""
    for upload in Path(tempfile.gettempdir()).glob("tmp*"):
        remove_file(str(upload))
    status, detail = 500, f"{type(error).__name__}: {error}"
    if isinstance(error, HTTPException):
        status, detail = error.status_code, error.detail
    elif isinstance(error, InputError):
        status, detail = (404 if isinstance(error, NotFound) else 400), str(error)
    elif isinstance(error, MONAILabelException):
        status, detail = 404, error.msg
    elif isinstance(error, json.JSONDecodeError):
        status, detail = 400, f"not JSON: {error}"
    detail = " ".join(str(detail).replace(f"{settings.MONAI_LABEL_STUDIES}/", "").split())  # hides the folder
    logger.warning("%s %s: %s %s", request.method, request.url.path, status, detail)
    return JSONResponse({"detail": detail}, status_code=status)
