"""The Slicer module without 3D Slicer: its client against a server of a few lines, its widgets over stand-ins. What Qt
and MRML really do is not tested here; SyntheticCTTest in the module is for that, in Slicer."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from conftest import ROOT

FOLDER = ROOT / "bundle" / "slicer" / "SyntheticCT"
sys.path.insert(0, str(FOLDER))
from SyntheticCTLib.client import Client, ServerError, Synthesis, unpack  # noqa: E402

VOLUME = b"NRRD\r\n--boundary\r\n\x00\xff\r\n\r\n"  # bytes that a careless parser of forms would cut
ANSWER = {"seed": 5, "model_sha256": "ab" * 32, "warnings": ["another sequence"]}


class Handler(BaseHTTPRequestHandler):
    """Answers as MONAI Label does, and takes notes."""

    def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path.partition("?")[0], body))
        if self.path.startswith("/infer"):
            self.server.release.wait(20)
            if self.server.refusal:
                return self._answer(400, json.dumps({"detail": self.server.refusal}).encode())
            spread = {"label": "x", "tag": "uncertainty"} if b'"num_samples": 2' in body else None
            info = {**ANSWER, "uncertainty": spread}
            head = b'--edge\r\nContent-Disposition: form-data; name="params"\r\n\r\n' + json.dumps(info).encode()
            file = b'\r\n--edge\r\nContent-Disposition: form-data; name="image"; filename="a.nrrd"\r\n\r\n' + VOLUME
            return self._answer(200, head + file + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge")
        if self.path.startswith("/datastore/label"):
            return self._answer(200, b"uncertain", "application/octet-stream")
        self._answer(200, json.dumps({"models": {"synthetic_ct": {"config": {"seed": 0}}}}).encode())

    do_GET = do_PUT = do_POST = do_DELETE = _handle

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.release, server.refusal = [], threading.Event(), ""
    server.release.set()
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def mr(tmp_path: Path) -> Path:
    path = tmp_path / "my.first.mr.nii.gz"
    path.write_bytes(b"\x1f\x8b\r\n--\x00")
    return path


# the client


def test_the_volume_comes_back_byte_for_byte_and_the_upload_is_removed(server, mr, tmp_path):
    result = Client(server.address).synthesize(mr, "synthetic_ct", {"num_samples": 2}, tmp_path)
    assert result.volume.read_bytes() == VOLUME and result.uncertainty.read_bytes() == b"uncertain"
    assert result.info["seed"] == 5
    assert [(method, path) for method, path, _ in server.seen] == [
        ("PUT", "/datastore/image"), ("POST", "/infer/synthetic_ct"), ("GET", "/datastore/label"),
        ("DELETE", "/datastore/image"),
    ]  # fmt: skip
    sent = server.seen[0][2]
    assert mr.read_bytes() in sent and b'filename="image.nii.gz"' in sent and b"my.first" not in sent
    assert Client(server.address).synthesize(mr, "synthetic_ct", {}, tmp_path).uncertainty is None


def test_a_refusal_is_the_servers_sentence_and_the_upload_is_removed(server, mr, tmp_path):
    server.refusal = "num_inference_steps 0: must be a whole number from 1 to 1000"
    with pytest.raises(ServerError, match="^num_inference_steps 0: must be a whole number from 1 to 1000$"):
        Client(server.address).synthesize(mr, "synthetic_ct", {}, tmp_path)
    assert server.seen[-1][:2] == ("DELETE", "/datastore/image")
    assert not (tmp_path / "sct.nrrd").exists()


def test_cancel_frees_the_thread_that_waits_and_removes_the_upload(server, mr, tmp_path):
    server.release.clear()
    client, errors = Client(server.address), []

    def work() -> None:
        try:
            client.synthesize(mr, "synthetic_ct", {}, tmp_path)
        except ServerError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while not any(path.startswith("/infer") for _, path, _ in server.seen):
        time.sleep(0.01)
    client.cancel()
    thread.join(10)
    assert not thread.is_alive() and errors == ["cancelled"]
    for _ in range(100):  # the removal follows on its own
        if server.seen[-1][0] == "DELETE":
            break
        time.sleep(0.02)
    assert server.seen[-1][:2] == ("DELETE", "/datastore/image")


@pytest.mark.parametrize(
    "address, words",
    [("localhost", "is not an address"), ("ftp://a", "is not an address"),
     ("http://127.0.0.1:1", "is the server running"), ("http://127.0.0.1:99999", "is not an address")],
)  # fmt: skip
def test_an_address_that_is_none_gives_a_sentence(address, words):
    with pytest.raises(ServerError, match=words):
        Client(address).models()


# the widgets, over stand-ins for Qt, CTK and Slicer


class Widgets:
    """Every class of Qt: a call makes a new thing that takes whatever is done to it."""

    def __getattr__(self, name: str) -> Any:
        def make(*args: Any) -> MagicMock:
            widget = MagicMock()
            widget.rowCount.return_value = 0
            return widget

        return make


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    base = type("Base", (), {"__init__": lambda self, parent=None: setattr(self, "layout", MagicMock()),
                             "setup": lambda self: None})  # fmt: skip
    slicer = MagicMock()
    names = ("ScriptedLoadableModule", "ScriptedLoadableModuleTest", "ScriptedLoadableModuleWidget")
    bases = SimpleNamespace(**{name: base for name in names})
    slicer.util.exportNode.side_effect = lambda node, path: bool(Path(path).write_bytes(b"volume"))
    fakes = {"qt": Widgets(), "ctk": MagicMock(), "slicer": slicer, "slicer.ScriptedLoadableModule": bases}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delitem(sys.modules, "SyntheticCT", raising=False)
    yield importlib.import_module("SyntheticCT")
    sys.modules.pop("SyntheticCT", None)


def connected(module: ModuleType, address: str, options: dict[str, Any]) -> Any:
    widget = module.SyntheticCTWidget()
    widget.setup()
    widget.address.text = address
    widget.onConnect()
    widget.models["synthetic_ct"], widget.model.currentText = options, "synthetic_ct"
    widget.onModel()
    return widget


def apply(widget: Any) -> None:
    widget.onApply()
    while widget.cancelButton.enabled:  # as long as the module is busy
        widget.onTimer()


def test_the_result_is_loaded_in_a_ct_window_over_the_mr_with_its_uncertainty(module, server):
    slicer = module.slicer
    files = []
    slicer.util.loadVolume.side_effect = lambda path, properties: files.append(Path(path).read_bytes()) or MagicMock()
    widget = connected(module, server.address, {"num_samples": 2, "strict": False, "way": ["whole"], "hu": "[0, 1]"})
    widget.options["way"].currentText, widget.options["hu"].text = "whole", "[0, 1]"
    apply(widget)
    assert files == [VOLUME, b"uncertain"]
    layers = slicer.util.setSliceViewerLayers.call_args.kwargs
    assert layers["background"] is widget.volume.currentNode() and layers["foregroundOpacity"] == 0.5
    display = layers["foreground"].GetDisplayNode()
    display.SetWindowLevel.assert_called_once_with(400, 40)
    sent = next(body for _, path, body in server.seen if path.startswith("/infer"))
    for option in (b'"num_samples": 2', b'"strict": false', b'"way": "whole"', b'"hu": "[0, 1]"'):
        assert option in sent
    assert "seed 5" in widget.status.text and "warning: another sequence" in widget.status.text
    assert widget.applyButton.enabled is True and not Path(widget.folder.name).exists()


def test_a_refusal_is_shown_and_nothing_is_loaded(module, server):
    server.refusal = "no such weights"
    widget = connected(module, server.address, {"seed": 0})
    apply(widget)
    module.slicer.util.errorDisplay.assert_called_once_with("no such weights")
    module.slicer.util.loadVolume.assert_not_called()
    assert widget.applyButton.enabled is True and not Path(widget.folder.name).exists()


def test_without_a_server_or_an_mr_a_sentence(module, server):
    widget = connected(module, "http://127.0.0.1:1", {})
    assert "is the server running" in module.slicer.util.errorDisplay.call_args.args[0]
    widget = connected(module, server.address, {"seed": 0})
    widget.volume.currentNode.return_value = None
    widget.onApply()
    module.slicer.util.errorDisplay.assert_called_with("Choose the MR first.")
    assert widget.thread is None


def test_the_test_for_slicer_is_there_and_result_types_agree(module):
    assert module.Synthesis is Synthesis and callable(module.SyntheticCTTest.runTest)
    cmake = (FOLDER / "CMakeLists.txt").read_text()
    assert all(path.name in cmake for path in (FOLDER / "SyntheticCTLib").glob("*.py"))


def test_a_dicom_series_is_unpacked_and_anything_else_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "sct.zip", "w") as archive:
        for name in ("ct_0002.dcm", "ct_0001.dcm"):
            archive.writestr(name, name)
    assert unpack(tmp_path / "sct.zip") == tmp_path / "sct" / "ct_0001.dcm"
    assert sorted(path.name for path in (tmp_path / "sct").iterdir()) == ["ct_0001.dcm", "ct_0002.dcm"]
    (tmp_path / "b.zip").write_bytes(b"no archive")
    with pytest.raises(ServerError, match="did not send a DICOM series"):
        unpack(tmp_path / "b.zip")
