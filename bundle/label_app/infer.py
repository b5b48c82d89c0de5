"""The infer task: ``configs/inference.yaml`` on the image of a request."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote

from monai.bundle import ConfigParser
from monailabel.config import settings
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from bundle.label_app.options import Options
from bundle.label_app.studies import Studies, check_name, check_volume_file, errors_name
from bundle.workflow import ROOT, inference_workflow
from custom_modules.data.volumes import EXTENSIONS, sibling_path
from custom_modules.errors import InputError
from custom_modules.settings import Setting

KEEP = Setting("bool", "keep the synthetic CT in the studies folder")
DICOM = Setting("bool", "return a DICOM CT series in a .zip")
ARCHIVE = ".zip"
UNCERTAINTY = "uncertainty"  # label tag of the samples' standard deviation
SD, MADE = "sd.nii.gz", "made"  # the same in the folder of a session, and where in it


@contextmanager
def logged_warnings(hidden: str) -> Iterator[list[str]]:
    """Yield a list that receives the warnings in the log of the bundle, without the path ``hidden``."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage().replace(f"{hidden}: ", ""))  # type: ignore[method-assign]
    logger = logging.getLogger("custom_modules")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


class Synthesis(InferTask):
    """MR to synthetic CT, int16 HU on the MR's grid.

    One request runs at a time; each reads the weights again, so that it uses the current ones.

    Args:
        studies: of the server.
        checkpoint: returns the path of the current weights.
    """

    def __init__(self, studies: Studies, checkpoint: Callable[[], Path]) -> None:
        config = ConfigParser.load_config_file(str(ROOT / "configs" / "inference.yaml"))
        self.options = Options(
            config,
            ["output", "num_inference_steps", "num_samples", "sample_steps", "seed", "sampling", "hu_window", "strict"],
            {"save_label": (KEEP, False), "save_image": (KEEP, False), "dicom": (DICOM, False)},
        )  # fmt: skip
        description = "Synthetic CT in Hounsfield units from MR, a scalar volume on the MR's grid"
        super().__init__(InferType.OTHERS, None, 3, description, self.options.shown())
        self.studies, self.checkpoint, self.lock = studies, checkpoint, Lock()

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Synthesise the CT of ``request["image"]``, an id or path in the studies folder.

        ``result_extension`` is a supported extension, by default that of the MR, or ``.zip``, as ``dicom`` is, for a
        DICOM CT series: in the study of an MR that is a DICOM series, otherwise in one of its own. ``save_label``
        keeps the result as label ``label_tag`` of the image, ``save_image`` as a further image ``<id>_sct``, and the
        standard deviation of several samples is kept as label ``uncertainty``: all three for images of the datastore
        only. For the image of a session, the last is kept in the session's folder. ``files`` in the answer has the
        addresses of such files.

        Returns:
            The file, which the caller has to remove, and the information about it for the client.

        Raises:
            InputError: for an option, image or weights that cannot be used.
        """
        chosen = self.options.chosen(request)
        save_label, save_image, dicom = (chosen.pop(name) for name in ("save_label", "save_image", "dicom"))
        image_id, path = self.studies.resolve(str(request.get("image") or ""))
        tag = request.get("label_tag") or DefaultLabelTag.ORIGINAL
        tag = str(tag.value if isinstance(tag, DefaultLabelTag) else tag)
        check_name(tag)
        if tag == DefaultLabelTag.FINAL.value:
            raise InputError(f"label_tag '{tag}' is for CTs to train on; use another for a synthetic CT")
        with errors_name(path, f"image '{image_id}'" if image_id else "the image"), self.lock:
            volume = check_volume_file(path)
            wanted = str(request.get("result_extension") or "")
            dicom = dicom or wanted.lower() == ARCHIVE
            extension = EXTENSIONS[0] if dicom else self._extension(wanted, volume["output"])
            # named apart from uploads, which are removed when a request fails
            with tempfile.TemporaryDirectory(prefix="result") as folder:
                made = Path(folder) / f"sct{extension}"
                result = f"{folder}_sct{ARCHIVE if dicom else extension}"
                chosen["output_format"] = "both" if dicom else "mr"
                info = self._run({"image": volume["image"], "output": "sct" if dicom else made.name}, folder, chosen)
                if image_id and save_label:
                    self.studies.keep(image_id, made, tag, {"params": info})
                if image_id and save_image:
                    self.studies.add_image(f"{image_id}_sct", str(made), {"params": info})
                if image_id and sibling_path(made, "_sd").exists():
                    info["uncertainty"] = {"label": image_id, "tag": UNCERTAINTY, "units": "HU"}
                    self.studies.keep(image_id, sibling_path(made, "_sd"), UNCERTAINTY, {"params": info})
                    info["files"]["SD"] = f"/datastore/label?label={quote(image_id)}&tag={UNCERTAINTY}"
                elif sibling_path(made, "_sd").exists() and extension == ".nii.gz" and (kept := self._session(path)):
                    (kept / MADE).mkdir(exist_ok=True)
                    shutil.copy(sibling_path(made, "_sd"), kept / MADE / SD)
                    info["files"]["SD"] = f"/volume?session_id={kept.name}&what={SD}"
                if dicom:
                    info["result_kind"] = "dicom_series"
                    made = Path(shutil.make_archive(str(Path(folder) / "series"), "zip", Path(folder) / "sct"))
                os.replace(made, result)
        return result, info

    def _session(self, image: Path) -> Path | None:
        """Return the folder of the session that an image belongs to; None if it belongs to none."""
        sessions = Path(settings.MONAI_LABEL_SESSION_PATH).resolve()
        image = Path(str(image).split("#")[0])
        return sessions / image.relative_to(sessions).parts[0] if image.is_relative_to(sessions) else None

    @staticmethod
    def _extension(wanted: str, output: str) -> str:
        """Return the extension that is wanted, otherwise that of ``output``, NIfTI's for a DICOM series."""
        extension = next((e for e in EXTENSIONS if (wanted or output).lower().endswith(e)), None)
        if wanted and extension is None:
            raise InputError(f"result_extension must be one of {', '.join((*EXTENSIONS, ARCHIVE))}, got '{wanted}'")
        return extension or EXTENSIONS[0]

    def _run(self, volume: dict[str, str], folder: str, chosen: dict[str, Any]) -> dict[str, Any]:
        """Run the bundle's inference on one volume, with results in ``folder``; return the information for a client."""
        own: dict[str, Any] = {"output_dir": folder, "checkpoint": str(self.checkpoint()), "dataset#data": [volume]}
        workflow = inference_workflow(keep_network=True, **own, **chosen)
        try:
            with logged_warnings(volume["image"]) as warnings:
                workflow.run()
        except SystemExit as error:  # inference ends the program with one line
            raise InputError(str(error).splitlines()[-1].strip().removeprefix("error: ")) from error
        record = json.loads(sibling_path(Path(folder) / volume["output"], "", ".json").read_text())
        guard = record["guard"] or {}
        return {
            "result_kind": "scalar_volume",
            "units": "HU",
            "seed": chosen["seed"],
            "warnings": warnings,
            "guard_score": guard.get("score"),
            "uncertainty": None,
            "files": {},
            **{name: value for name, value in record.items() if name not in ("input", "output", "guard")},
        }
