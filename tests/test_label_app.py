"""The MONAI Label app, live: a server in its own environment, MONAI Label's client and the Slicer module's; bad
input."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import INFERENCE, ROOT, files_in, save
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat
from test_volumes import save_series

from bundle.label_app.options import Options
from bundle.phantom.command import torso_phantom
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError
from custom_modules.files import sha256

sys.path.insert(0, str(ROOT / "bundle" / "slicer" / "SyntheticCT"))
from SyntheticCTLib.client import Client, ServerError, _form, unpack  # noqa: E402

PYTHON = ROOT / ".venv-label" / "bin" / "python"
live = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-label; make test-label makes it and runs these")
MODEL, SETTINGS = "synthetic_ct", {"seed": 3, "num_samples": 2}
PLUGIN = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}  # as the Slicer plugin
REAL_CLIENT = """
import json, sys
from monailabel.client import MONAILabelClient
client = MONAILabelClient(sys.argv[1], tmpdir=sys.argv[2])
print(json.dumps(getattr(client, sys.argv[3])(**json.loads(sys.argv[4]))))
"""


# options


OPTIONS = Options(
    {"num_inference_steps": 1, "overlap": 0.5, "hu_window": [-1.0, 2.0], "strict": False, "sampling": "whole"},
    ["num_inference_steps", "overlap", "hu_window", "strict", "sampling"],
)  # fmt: skip


def test_options_take_text_for_numbers_and_leave_the_rest_of_a_request_alone():
    wanted = {"num_inference_steps": 4, "overlap": 0.0, "hu_window": [0.0, 3.0], "strict": True, "sampling": "windows"}
    request = {"num_inference_steps": "4", "overlap": 0, "hu_window": "[0, 3]", "strict": "true", "sampling": "windows"}
    assert OPTIONS.chosen({**request, "result_dtype": "uint8"}) == wanted
    shown = OPTIONS.shown()
    assert OPTIONS.chosen({"hu_window": shown["hu_window"]}) == OPTIONS.chosen({})
    assert shown["sampling"] == ["whole", "windows"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_inference_steps", value) for value in (0, 1.5, "many", True, [1], 1e400)]
    + [("overlap", "NaN"), ("overlap", -0.1), ("hu_window", 4), ("hu_window", ["a", 1]), ("hu_window", [3, 1]),
       ("sampling", "other"), ("strict", "perhaps")],
)  # fmt: skip
def test_options_refuse_what_they_cannot_be(name, value):
    with pytest.raises(InputError, match=name):
        OPTIONS.chosen({name: value})


@pytest.mark.parametrize("name", ["num_inference_step", "stric", "samplin", "hu_windw"])
def test_options_refuse_a_misspelt_name(name):
    with pytest.raises(InputError, match=f"no setting '{name}'; did you mean"):
        OPTIONS.chosen({name: 1})


def test_the_label_environment_has_the_pins_of_the_bundle():
    pins = {}
    for name in ("requirements.txt", "requirements-label.txt"):
        lines = (ROOT / name).read_text().splitlines()
        pins[name] = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    both = pins["requirements.txt"].keys() & pins["requirements-label.txt"].keys() - {"pydicom"}
    assert {"torch", "monai", "numpy", "nibabel", "itk"} <= both
    assert {n: pins["requirements-label.txt"][n] for n in both} == {n: pins["requirements.txt"][n] for n in both}


# a server


class Server:
    """``monailabel start_server`` on a free port of loopback, with weights that a test may take away."""

    def __init__(self, root: Path) -> None:
        self.studies, self.weights, self.log = root / "studies", root / "weights" / "model.pt", root / "server.log"
        self.weights.parent.mkdir(parents=True)
        self.studies.mkdir()
        shutil.copy(ROOT / "models" / "model.pt", self.weights)
        self.start()

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [
            PYTHON, "-m", "monailabel.main", "start_server", "--app", ROOT / "bundle" / "label_app",
            "--studies", self.studies, "--host", "127.0.0.1", "--port", self.port, "--conf", "checkpoint", self.weights,
        ]  # fmt: skip
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log, env=environment)
        for _ in range(600):
            try:
                Client(self.address).models()
                return
            except ServerError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-3000:])

    def ask(
        self, method: str, selector: str, params: Any = None, file: Path | None = None, part: str = "file"
    ) -> tuple[int, Any]:
        """Status and body of the response, parsed if it is JSON."""
        headers, body = {}, None
        if selector.startswith("/batch"):
            headers, body = {"Content-Type": "application/json"}, json.dumps(params).encode()
        elif params is not None or file is not None:
            text = params if isinstance(params, str) else json.dumps(params or {})
            headers = {"Content-Type": "multipart/form-data; boundary=xyz"}
            body = _form("xyz", {"params": text}, file).replace(b'name="file"', f'name="{part}"'.encode(), 1)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, selector, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = response.getheader("Content-Type", "").startswith("application/json")
        return response.status, json.loads(content) if is_json else content

    def client(self, folder: Path, method: str, **arguments: Any) -> Any:
        """Return the result of MONAI Label's own client, run in its own environment."""
        command = [str(PYTHON), "-c", REAL_CLIENT, self.address, str(folder), method, json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def finished(self, selector: str) -> dict[str, Any]:
        """A task of the background once it has ended."""
        for _ in range(400):
            _, task = self.ask("GET", selector)
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                break
            time.sleep(0.5)
        return task

    def leftovers(self) -> list[str]:
        return files_in(self.studies / MODEL / "tmp") + files_in(self.studies / MODEL / "sessions")

    def wait_until_idle(self) -> None:
        Client(self.address).models()  # requests are handled in turn
        for _ in range(50):
            if not self.leftovers():
                return
            time.sleep(0.1)


@pytest.fixture(scope="module")
def mr(tmp_path_factory) -> Path:
    """An oblique MR of a few seconds' work."""
    values, _, _ = torso_phantom(shape=(30, 28, 24), spacing=4.0)
    affine = from_matvec(euler2mat(0.2, -0.15, 0.3) @ np.diag([2.0, 2, 2.5]), [10, -200, 30])
    return save(tmp_path_factory.mktemp("mr") / "mr.nii.gz", values, affine)


@pytest.fixture(scope="module")
def server(tmp_path_factory, mr) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("label"))
    assert server.ask("PUT", "/datastore/image?image=mr", {}, mr) == (200, {"image": "mr"})
    yield server
    server.process.terminate()
    server.process.wait(20)


@pytest.fixture(scope="module")
def by_bundle(tmp_path_factory, mr) -> Path:
    """The folder that ``python -m monai.bundle run`` writes for the same MR and settings."""
    out = tmp_path_factory.mktemp("bundle")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(INFERENCE), "--dataset_dir", str(mr)]
    command += ["--output_dir", str(out)] + [text for name in SETTINGS for text in (f"--{name}", str(SETTINGS[name]))]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True, capture_output=True)
    return out


def assert_same(path: str | Path, expected: Path) -> None:
    """Voxel for voxel, in dtype and in geometry."""
    found, wanted = read_volume(path), read_volume(expected)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-4)


@live
@pytest.mark.parametrize("sent", [{}, PLUGIN], ids=["plain", "as the Slicer plugin"])
def test_monai_labels_client_gets_what_monai_bundle_run_writes(server, by_bundle, tmp_path, sent):
    path, info = server.client(tmp_path, "infer", model=MODEL, image_id="mr", params={**SETTINGS, **sent})
    assert path.endswith(sent.get("result_extension", ".nii.gz"))
    assert_same(path, by_bundle / "mr_sct.nii.gz")
    dtype = itk.array_from_image(itk.imread(path)).dtype if sent else nib.load(path).get_data_dtype()
    assert dtype == np.int16
    record = json.loads((by_bundle / "mr_sct.json").read_text())
    assert info["result_kind"] == "scalar_volume" and info["units"] == "HU" and info["seed"] == 3
    assert info["model_sha256"] == sha256(ROOT / "models" / "model.pt") == record["model_sha256"]
    assert info["settings"] == record["settings"]
    guard = [f"not like the training MRs: {warning}" for warning in record["guard"]["warnings"]]
    assert guard and guard == [text for text in info["warnings"] if "training" in text]
    spread = server.client(tmp_path, "download_label", label_id="mr", tag=info["uncertainty"]["tag"])
    assert_same(spread, by_bundle / "mr_sct_sd.nii.gz")
    server.wait_until_idle()
    assert server.leftovers() == []


@live
def test_an_upload_in_the_request_and_a_session_get_the_same(server, by_bundle, mr, tmp_path):
    path, info = server.client(tmp_path, "infer", model=MODEL, image_id="", params=SETTINGS, file=str(mr))
    assert_same(path, by_bundle / "mr_sct.nii.gz")
    assert info["uncertainty"] is None
    session = server.client(tmp_path, "create_session", image_in=str(mr))["session_id"]
    path, _ = server.client(tmp_path, "infer", model=MODEL, image_id="", params=SETTINGS, session_id=session)
    assert_same(path, by_bundle / "mr_sct.nii.gz")
    assert server.ask("DELETE", f"/session/{session}")[0] == 200
    server.wait_until_idle()
    assert server.leftovers() == []


@live
def test_a_dicom_series_in_the_studies_folder_by_its_path(server, tmp_path):
    values, _, _ = torso_phantom(shape=(20, 20, 20), spacing=4.0)
    series = save_series(server.studies / "patient" / "series", values.T.astype(int))
    info = Client(server.address).infer(MODEL, "patient/series", {}, tmp_path / "sct.nrrd")
    sct, mr = read_volume(tmp_path / "sct.nrrd"), read_volume(series)
    assert sct.shape == mr.shape and info["result_kind"] == "scalar_volume"
    np.testing.assert_allclose(sct.affine, mr.affine, atol=1e-3)
    info = Client(server.address).infer(MODEL, "patient/series", {}, tmp_path / "sct.zip")
    study = pydicom.dcmread(next(series.iterdir())).StudyInstanceUID
    shutil.rmtree(series.parent)
    first = unpack(tmp_path / "sct.zip")
    np.testing.assert_array_equal(np.asarray(read_volume(first.parent)[0]), np.asarray(sct[0]))
    assert pydicom.dcmread(first).StudyInstanceUID == study and info["result_kind"] == "dicom_series"


@live
def test_the_slicer_modules_client(server, by_bundle, mr, tmp_path):
    client, steps = Client(server.address), []
    assert client.models()[MODEL]["num_samples"] == 1
    result = client.synthesize(mr, MODEL, SETTINGS, tmp_path, steps.append)
    assert_same(result.volume, by_bundle / "mr_sct.nii.gz")
    assert_same(result.uncertainty, by_bundle / "mr_sct_sd.nii.gz")
    assert result.info["seed"] == 3 and steps == ["sending the MR", "synthesising", "fetching the uncertainty"]
    with pytest.raises(ServerError, match="must be a whole number from 1 to 1000"):
        client.synthesize(mr, MODEL, {"num_inference_steps": 0}, tmp_path)
    for _ in range(50):  # the server's watcher takes a moment to see that a file is gone
        images = server.ask("GET", "/datastore/?output=all")[1]["objects"]
        if list(images) == ["mr"]:
            break
        time.sleep(0.1)
    assert list(images) == ["mr"] and not list(server.studies.glob("slicer_*"))


@live
def test_the_synthetic_ct_can_be_kept_as_label_and_as_image(server, by_bundle, tmp_path):
    kept = {"save_label": True, "label_tag": "original", "save_image": True}
    status, _ = server.ask("POST", f"/infer/{MODEL}?image=mr&output=json", {**SETTINGS, **kept})
    assert status == 200
    assert_same(server.studies / "labels" / "original" / "mr.nii.gz", by_bundle / "mr_sct.nii.gz")
    assert_same(server.studies / "mr_sct.nii.gz", by_bundle / "mr_sct.nii.gz")
    assert "mr_sct" in server.ask("GET", "/datastore/?output=all")[1]["objects"]
    assert server.ask("DELETE", "/datastore/image?id=mr_sct")[0] == 200


# bad input


def files_to_refuse(folder: Path) -> dict[str, Path]:
    rng, affine = np.random.default_rng(0), np.diag([2.0, 2, 2, 1])
    colours = np.zeros((12, 12, 12), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["R"] = rng.integers(0, 255, colours.shape)
    (folder / "text.nii.gz").write_text("no image")
    (folder / "model.py").write_text("import os")
    (folder / "empty.nrrd").touch()
    return {
        "label map": save(folder / "labels.nii.gz", rng.integers(0, 5, (12, 12, 12)).astype(np.uint8), affine),
        "colours": save(folder / "colours.nii.gz", colours, affine),
        "text": folder / "text.nii.gz",
        "program": folder / "model.py",
        "empty": folder / "empty.nrrd",
    }


INFER = f"/infer/{MODEL}?image=mr"
REFUSED = {
    "unknown model": ("POST", "/infer/other?image=mr", {}, 404, "no model 'other'"),
    "unknown image": ("POST", f"/infer/{MODEL}?image=nobody", {}, 404, "no image 'nobody'"),
    "no image": ("POST", f"/infer/{MODEL}?session_id=nobody", {}, 404, "no image"),
    "path outside": ("POST", f"/infer/{MODEL}?image=/etc/hostname", {}, 404, "studies folder"),
    "path upwards": ("POST", f"/infer/{MODEL}?image=../weights/model.pt", {}, 404, "studies folder"),
    "path in the options": ("POST", INFER, {"image": "/etc/hostname"}, 404, "studies folder"),
    "no volume there": ("POST", f"/infer/{MODEL}?image=datastore_v2.json", {}, 400, "not a volume"),
    "no steps": ("POST", INFER, {"num_inference_steps": 0}, 400, "1 to 1000"),
    "absurd steps": ("POST", INFER, {"num_inference_steps": 10**9}, 400, "1 to 1000"),
    "negative seed": ("POST", INFER, {"seed": -1}, 400, "seed -1: must be a whole number from 0 to"),
    "no samples": ("POST", INFER, {"num_samples": 0}, 400, "num_samples 0: must be a whole number from 1 to 64"),
    "text for a number": ("POST", INFER, {"seed": "abc"}, 400, "whole number"),
    "another sampling": ("POST", INFER, {"sampling": "other"}, 400, "whole, windows"),
    "another HU window": ("POST", INFER, {"hu_window": [-800, 800]}, 400, "trained with hu_window"),
    "unlike the training MRs, strictly": ("POST", INFER, {"strict": True}, 400, "not like the training MRs"),
    "another extension": ("POST", INFER, {"result_extension": ".exe"}, 400, "result_extension must be one of"),
    "a synthetic CT to learn from": ("POST", INFER, {"save_label": True, "label_tag": "final"}, 400, "CTs to train on"),
    "a label tag upwards": ("POST", INFER, {"save_label": True, "label_tag": "../../x"}, 400, "cannot be a name"),
    "options that are no JSON": ("POST", INFER, "{", 400, "not JSON"),
    "training an unknown model": ("POST", "/train/other", None, 404, "no model 'other'"),
    "training on nothing": ("POST", f"/train/{MODEL}?run_sync=true", None, 400, "at least two images"),
    "unknown weights": ("GET", "/model/other", None, 404, "no model 'other'"),
    "the bundle's weights": ("DELETE", f"/model/{MODEL}", None, 404, "NOT Found"),
    "removing an unknown image": ("DELETE", "/datastore/image?id=nobody", None, 404, "nobody"),
    "an unknown label": ("GET", "/datastore/label?label=mr&tag=other", None, 404, "NOT Found"),
    "a dataset of nothing": ("GET", "/datastore/dataset", None, 404, "nothing to download"),
    "an unknown strategy": ("POST", "/activelearning/other", None, 404, "other"),
}  # fmt: skip


@live
@pytest.mark.parametrize("case", list(REFUSED))
def test_a_bad_request_is_answered_with_4xx_and_a_sentence(server, case):
    method, selector, params, status, words = REFUSED[case]
    found, response = server.ask(method, selector, params)
    assert (found, words in response["detail"]) == (status, True), response
    assert "\n" not in response["detail"] and str(server.studies) not in response["detail"]
    assert server.process.poll() is None and server.leftovers() == []


@live
@pytest.mark.parametrize("case", ["label map", "colours", "text", "program", "empty"])
def test_an_upload_that_is_no_image_is_refused_everywhere_and_leaves_nothing(server, tmp_path, case):
    file = files_to_refuse(tmp_path)[case]
    before = files_in(server.studies)
    requests = [("POST", f"/infer/{MODEL}", "file"), ("PUT", "/datastore/image?image=new", "file")]
    requests += [("PUT", "/session/", "files")]
    if case != "label map":  # which a label may be; training refuses it then
        requests.append(("PUT", "/datastore/label?image=mr&tag=final", "label"))
    for method, selector, part in requests:
        status, response = server.ask(method, selector, {}, file, part)
        assert 400 <= status < 500 and str(server.studies) not in response["detail"], (selector, response)
    server.wait_until_idle()
    assert files_in(server.studies) == before


@live
@pytest.mark.parametrize("name", ["../escaped", "/escaped", "..", "a/b", ".hidden"])
def test_names_from_clients_stay_inside_the_studies_folder(server, mr, name):
    before = files_in(server.studies.parent)
    quoted = name.replace("/", "%2F")
    assert server.ask("PUT", f"/datastore/image?image={quoted}", {}, mr)[0] == 400
    assert server.ask("PUT", f"/datastore/label?image=mr&tag={quoted}", {}, mr, "label")[0] == 400
    assert files_in(server.studies.parent) == before


@live
def test_without_weights_a_sentence_and_with_them_again_a_synthetic_ct(server):
    away = server.weights.with_suffix(".away")
    server.weights.rename(away)
    try:
        status, response = server.ask("POST", f"{INFER}&output=json", {})
        assert status == 400 and "no such weights" in response["detail"]
    finally:
        away.rename(server.weights)
    assert server.ask("POST", f"{INFER}&output=json", {})[0] == 200


# the page


DROP = """async ([files, zone]) => {
  const transfer = new DataTransfer();
  for (const [name, data] of files) {
    transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
  }
  const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.getElementById("drop").dispatchEvent(event);
}"""


def dropped(page, *paths: Path) -> None:
    """Drop files on the page, as a person does."""
    files = [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths]
    page.evaluate(DROP, [files, "drop"])


@live
def test_a_drop_on_the_page_ends_in_what_monai_bundle_run_writes(server, by_bundle, mr, tmp_path, watch):
    watched = watch()
    page = watched.open(f"{server.address}/")
    page.fill("#samples", "2")
    page.fill("#seed", "3")
    dropped(page, mr)
    page.wait_for_selector("#result-viewer[data-state=open]", timeout=180_000)
    with page.expect_download() as download:
        page.locator("#downloads a").first.click()
    download.value.save_as(tmp_path / "sct.nii.gz")
    assert download.value.suggested_filename == "mr_sct.nii.gz"
    assert_same(tmp_path / "sct.nii.gz", by_bundle / "mr_sct.nii.gz")
    with page.expect_download(timeout=180_000) as download:
        page.get_by_role("button", name="DICOM").click()
    download.value.save_as(tmp_path / "sct.zip")
    assert download.value.suggested_filename == "mr_sct_dicom.zip"
    series, nifti = (read_volume(path) for path in (unpack(tmp_path / "sct.zip").parent, by_bundle / "mr_sct.nii.gz"))
    assert np.sort(np.ravel(series)).tolist() == np.sort(np.ravel(nifti)).tolist()  # in the order of DICOM's axes
    page.evaluate("viewer.nv.scene.crosshairPos = [15.5 / 30, 13.5 / 28, 12.5 / 24]")  # amid a voxel, not between two
    found = page.evaluate("viewer.values()")
    assert page.evaluate("viewer.layers.map((layer) => layer.name)") == ["MR", "synthetic CT", "SD"]
    for value, path in zip(found["values"], (mr, by_bundle / "mr_sct.nii.gz", by_bundle / "mr_sct_sd.nii.gz")):
        volume = read_volume(path)
        i, j, k = nib.affines.apply_affine(np.linalg.inv(np.asarray(volume.affine)), found["mm"]).round().astype(int)
        assert value == pytest.approx(float(volume[0, i, j, k]), abs=1e-3)
    assert "training" in page.locator("#warnings").inner_text()
    assert [url for url in watched.requests if not url.startswith((server.address, "data:", "blob:"))] == []
    assert watched.console == []


@live
def test_what_cannot_be_used_is_said_on_the_page_and_the_next_drop_works(server, mr, tmp_path, watch):
    page = watch().open(f"{server.address}/")
    problem = page.locator("#problem")
    (tmp_path / "a.nii.gz").write_text("no image")
    other = save(tmp_path / "b.nii.gz", np.random.default_rng(0).normal(500, 90, (12, 12, 12)).astype(np.float32))
    for paths, words in (((tmp_path / "a.nii.gz",), "cannot be read"), ((mr, other), "holds 2 volumes")):
        dropped(page, *paths)
        page.wait_for_function("(words) => document.getElementById('problem').textContent.includes(words)", arg=words)
    page.evaluate("document.getElementById('drop').dataset.limit = 10")
    dropped(page, mr)
    page.wait_for_function("() => document.getElementById('problem').textContent.includes('drop a smaller MR')")
    page.evaluate("document.getElementById('drop').dataset.limit = 1e9")
    dropped(page, mr)
    dropped(page, mr)
    assert "One MR at a time" in problem.text_content()
    page.wait_for_selector("#result-viewer[data-state=open]", timeout=180_000)


@live
def test_studies_are_listed_and_the_api_and_ohif_pages_need_no_internet(server, watch):
    for path, words in (("/", "mr"), ("/docs", "/infer/{model}"), ("/ohif/", "DICOM server")):
        watched = watch(420)
        page = watched.open(f"{server.address}{path}")
        page.wait_for_function("(words) => document.body.innerText.includes(words)", arg=words)
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        assert [url for url in watched.requests if not url.startswith((server.address, "data:"))] == []
        assert watched.console == []


@live
def test_a_request_that_says_it_has_two_gigabytes_is_refused_unread(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("PUT", "/session/")
    connection.putheader("Content-Length", "2000000000")
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413 and "send a smaller MR" in json.loads(response.read())["detail"]
    assert server.ask("GET", "/info/")[0] == 200


@live
def test_a_zip_of_a_dicom_series_is_a_session_and_a_hostile_one_is_refused(server, tmp_path):
    values, _, _ = torso_phantom(shape=(20, 20, 20), spacing=4.0)
    series = save_series(tmp_path / "series", values.T.astype(int))
    before = files_in(server.studies.parent)
    for name, write in (("good", True), ("../../escaped", False)):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for path in sorted(series.iterdir()) if write else []:
                archive.write(path, f"patient/series/{path.name}")
            if not write:
                archive.writestr(f"{name}.nii.gz", b"no image")
        status, answer = server.ask("PUT", "/session/?uncompress=true", {}, tmp_path / "a.zip", "files")
        assert (status == 200) == write, answer
        if write:
            session = answer["session_id"]
            status, info = server.ask("POST", f"/infer/{MODEL}?session_id={session}&output=json", {})
            assert status == 200 and info["result_kind"] == "scalar_volume"
            assert server.ask("GET", f"/volume?session_id={session}")[0] == 200
            assert server.ask("GET", f"/volume?session_id={session}&what=sd.nii.gz")[0] == 404
            assert server.ask("DELETE", f"/session/{session}")[0] == 200
    (tmp_path / "a.zip").write_bytes(b"no zip")
    status, answer = server.ask("PUT", "/session/?uncompress=true", {}, tmp_path / "a.zip", "files")
    assert status == 400 and "cannot be unpacked" in answer["detail"]
    server.wait_until_idle()
    assert files_in(server.studies.parent) == before


@live
def test_a_mistyped_studies_folder_is_refused_and_not_made(tmp_path):
    command = [PYTHON, "-m", "monailabel.main", "start_server", "--app", ROOT / "bundle" / "label_app"]
    command += ["--studies", tmp_path / "mistyped", "--host", "127.0.0.1", "--port", "0"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0 and "mistyped: no such folder" in done.stdout + done.stderr
    assert not (tmp_path / "mistyped").exists()


# a server among people


@live
def test_a_batch_is_synthesised_in_the_background(server, by_bundle):
    shutil.rmtree(server.studies / "labels" / "original", ignore_errors=True)
    assert server.ask("POST", f"/batch/infer/{MODEL}", SETTINGS)[0] == 200
    task = server.finished("/batch/infer")
    assert task["status"] == "DONE", task
    assert_same(server.studies / "labels" / "original" / "mr.nii.gz", by_bundle / "mr_sct.nii.gz")


@live
def test_two_requests_at_once_get_each_its_own(server, by_bundle, tmp_path):
    def infer(seed: int) -> tuple[Path, int]:
        target = tmp_path / f"{seed}.nii.gz"
        info = Client(server.address).infer(MODEL, "mr", {**SETTINGS, "seed": seed}, target)
        return target, info["seed"]

    with ThreadPoolExecutor(2) as pool:
        (first, a), (second, b) = pool.map(infer, (3, 4))
    assert (a, b) == (3, 4)
    assert_same(first, by_bundle / "mr_sct.nii.gz")
    assert (np.asarray(read_volume(second)) != np.asarray(read_volume(first))).any()


@live
def test_fifty_hostile_requests_beside_good_ones(server, by_bundle, mr, tmp_path):
    """Broken forms, bodies of noise, refused requests and files, and paths that lead outside, eight at a time: the
    server stays up, the good requests get what they should, and nothing is left or written elsewhere."""
    files, noise = list(files_to_refuse(tmp_path).values()), np.random.default_rng(0)
    (tmp_path / "list.csv").write_text(f"image\n{mr}\n")
    before = files_in(server.studies.parent)

    def raw(number: int) -> int:
        """A request whose body is not what its header says."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        kind = ["multipart/form-data; boundary=xyz", "multipart/form-data"][number % 2]
        connection.request("POST", f"/infer/{MODEL}?image=mr", noise.bytes(2000), {"Content-Type": kind})
        return connection.getresponse().status

    def good(seed: int) -> Path:
        target = tmp_path / f"good{seed}.nii.gz"
        Client(server.address).infer(MODEL, "mr", {**SETTINGS, "seed": 3}, target)
        return target

    quick = [case for name, case in REFUSED.items() if "unlike" not in name]
    hostile = [lambda c=case: server.ask(*c[:3])[0] for case in quick]
    hostile += [
        lambda f=file: server.ask("POST", f"/infer/{MODEL}", {}, f)[0] for file in [*files, tmp_path / "list.csv"]
    ]
    hostile += [lambda n=number: raw(n) for number in range(50 - len(hostile))]
    order = noise.permutation(len(hostile))
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(hostile[n]) for n in order]
        futures = [pool.submit(good, seed) for seed in range(4)]
        statuses = [result.result() for result in results]
        made = [future.result() for future in futures]
    assert len(statuses) == 50 and {s for s in statuses if not 400 <= s < 500} == set()
    for path in made:
        assert_same(path, by_bundle / "mr_sct.nii.gz")
    server.wait_until_idle()
    kept = {"studies/labels/uncertainty/mr.nii.gz", "studies/datastore_v2.json"}  # of the good requests
    assert server.leftovers() == [] and set(files_in(server.studies.parent)) <= set(before) | kept
    assert server.process.poll() is None


@live
def test_a_client_that_hangs_up_leaves_nothing(server, mr):
    form = _form("xyz", {"params": "{}"}, mr)
    for sent in (form, form[: len(form) // 2]):  # after the request, and in the middle of it
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.putrequest("POST", f"/infer/{MODEL}")
        connection.putheader("Content-Type", "multipart/form-data; boundary=xyz")
        connection.putheader("Content-Length", str(len(form)))
        connection.endheaders(sent)
        time.sleep(0.3)
        connection.close()
    server.wait_until_idle()
    assert server.leftovers() == []
    assert server.ask("POST", f"{INFER}&output=json", {})[0] == 200


@live
def test_the_slicer_modules_cancel_does_not_wait_for_the_server(server, mr, tmp_path):
    client = Client(server.address)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.synthesize, mr, MODEL, {"num_inference_steps": 4}, tmp_path)
        while not list((server.studies / MODEL / "tmp").glob("result*")):
            time.sleep(0.05)
        client.cancel()
        with pytest.raises(ServerError, match="cancelled"):
            request.result()
        assert list((server.studies / MODEL / "tmp").glob("result*"))  # it is still at work
    server.wait_until_idle()
    assert server.leftovers() == [] and not list(tmp_path.iterdir())
    for _ in range(50):
        if not list(server.studies.glob("slicer_*")):
            break
        time.sleep(0.1)
    assert not list(server.studies.glob("slicer_*"))


@live
def test_web_pages_of_others_may_not_read_answers(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/info/", headers={"Origin": "http://elsewhere.example"})
    response = connection.getresponse()
    assert response.status == 200 and response.getheader("Access-Control-Allow-Origin") is None


@live
def test_training_changes_the_weights_and_the_next_inference_uses_them(server, by_bundle, tmp_path):
    shipped = sha256(server.weights)
    for n in range(2):
        mr, ct, affine = torso_phantom(shape=(24, 24, 24), spacing=4.0, seed=n)
        ct += np.random.default_rng(n).normal(0, 15, ct.shape).astype(np.float32)  # or both would be one patient
        pair = save(tmp_path / f"mr{n}.nii.gz", mr, affine), save(tmp_path / f"ct{n}.nii.gz", ct, affine)
        server.client(tmp_path, "upload_image", image_in=str(pair[0]), image_id=f"pair{n}")
        server.client(tmp_path, "save_label", image_id=f"pair{n}", label_in=str(pair[1]), tag="final")
    server.client(
        tmp_path, "train_start", model=MODEL, params={"max_epochs": 1, "steps_per_epoch": 2, "augmented_copies": 1}
    )
    task = server.finished("/train/")
    assert task["status"] == "DONE", task
    stats = server.client(tmp_path, "info")["train_stats"][MODEL]
    path, info = server.client(tmp_path, "infer", model=MODEL, image_id="mr", params=SETTINGS)
    assert info["model_sha256"] == stats["model_sha256"] == sha256(server.studies / MODEL / "model.pt") != shipped
    assert stats["started_from_sha256"] == shipped == sha256(server.weights)
    assert (np.asarray(read_volume(path)) != np.asarray(read_volume(by_bundle / "mr_sct.nii.gz"))).any()
    assert not list((server.studies / MODEL).rglob("*checkpoint*"))
    assert server.ask("DELETE", f"/model/{MODEL}")[0] == 200  # back to the bundle's
    status, response = server.ask("POST", f"{INFER}&output=json", {})
    assert (status, response["model_sha256"]) == (200, shipped)


@live
def test_a_server_that_was_killed_at_work_starts_again_without_what_it_left(server, mr):
    with ThreadPoolExecutor(1) as pool:
        client = Client(server.address)
        request = pool.submit(client.infer, MODEL, "mr", {"num_inference_steps": 1000}, mr.with_name("never.nrrd"))
        for _ in range(100):
            if list((server.studies / MODEL / "tmp").glob("result*")):
                break
            time.sleep(0.1)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(20)
        with pytest.raises(ServerError, match="no response"):
            request.result(60)
    assert list((server.studies / MODEL / "tmp").iterdir()) and not mr.with_name("never.nrrd").exists()
    server.start()
    assert list((server.studies / MODEL / "tmp").iterdir()) == []
    assert server.ask("POST", f"{INFER}&output=json", {})[0] == 200
