"""3D Slicer module: shows the synthetic CT of an MR, from the bundle's MONAI Label server, over the MR. This file has
the widgets; requests to the server are in SyntheticCTLib.client."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import ctk
import qt
import slicer
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from SyntheticCTLib.client import Client, ServerError, Synthesis

ADDRESS = "http://127.0.0.1:8000"
CT_WINDOW, CT_LEVEL = 400, 40  # HU, soft tissue
OPACITY = 0.5  # of the synthetic CT over the MR
POLL = 100  # ms
PATIENCE = 5  # s, timeout of Connect, during which Slicer is blocked


class SyntheticCT(ScriptedLoadableModule):
    def __init__(self, parent: Any) -> None:
        super().__init__(parent)
        parent.title = "Synthetic CT"
        parent.categories = ["Synthesis"]
        parent.dependencies = []
        parent.contributors = ["The 3D-WLDM bundle developers"]
        parent.helpText = (
            "Sends the chosen MR to the MONAI Label server of the 3D-WLDM bundle and shows the synthetic CT, in "
            "Hounsfield units, over it. With two or more samples their standard deviation is loaded as a second volume."
        )
        parent.acknowledgementText = "For research only: not for diagnosis, dose calculation or attenuation correction."


class SyntheticCTWidget(ScriptedLoadableModuleWidget):
    """Server, model, MR and options at the top; Apply, Cancel, progress and messages of the server below."""

    def setup(self) -> None:
        super().setup()
        self.client: Client | None = None
        self.thread: threading.Thread | None = None
        self.options: dict[str, Any] = {}
        self.models: dict[str, dict[str, Any]] = {}

        panel = ctk.ctkCollapsibleButton()
        panel.text = "Synthetic CT"
        self.layout.addWidget(panel)
        self.form = qt.QFormLayout(panel)

        self.address = qt.QLineEdit(ADDRESS)
        self.connectButton = qt.QPushButton("Connect")
        self.connectButton.connect("clicked()", self.onConnect)
        self.model = qt.QComboBox()
        self.model.connect("currentIndexChanged(int)", self.onModel)
        self.volume = slicer.qMRMLNodeComboBox()
        self.volume.nodeTypes = ["vtkMRMLScalarVolumeNode"]
        self.volume.showChildNodeTypes = False  # no label maps
        self.volume.addEnabled = self.volume.removeEnabled = False
        self.volume.setMRMLScene(slicer.mrmlScene)
        for label, widget in (
            ("Server", self.address), ("", self.connectButton), ("Model", self.model), ("MR", self.volume),
        ):  # fmt: skip
            self.form.addRow(label, widget)
        self.optionsBox = qt.QGroupBox("Options")
        self.optionsForm = qt.QFormLayout(self.optionsBox)
        self.form.addRow(self.optionsBox)

        self.applyButton, self.cancelButton = qt.QPushButton("Apply"), qt.QPushButton("Cancel")
        self.applyButton.connect("clicked()", self.onApply)
        self.cancelButton.connect("clicked()", self.onCancel)
        self.progress = qt.QProgressBar()
        self.progress.setRange(0, 0)  # the server does not report progress
        self.status = qt.QLabel(f"Start the server with: make label STUDIES=DIR, then connect to {ADDRESS}")
        self.status.wordWrap = True
        for widget in (self.applyButton, self.cancelButton, self.progress, self.status):
            self.form.addRow(widget)
        self.layout.addStretch(1)
        self.timer = qt.QTimer()
        self.timer.setInterval(POLL)
        self.timer.connect("timeout()", self.onTimer)
        self.setBusy(False)

    def cleanup(self) -> None:
        self.timer.stop()
        self.onCancel()

    def setBusy(self, busy: bool) -> None:
        self.applyButton.enabled = not busy and bool(self.models)
        self.connectButton.enabled = not busy
        self.cancelButton.enabled = self.progress.visible = busy

    def onConnect(self) -> None:
        try:
            self.models = Client(self.address.text, PATIENCE).models()
        except ServerError as error:
            self.models = {}
            slicer.util.errorDisplay(str(error))
        self.model.clear()
        self.model.addItems(list(self.models))
        self.status.text = f"{len(self.models)} model(s) on {self.address.text}" if self.models else "not connected"
        self.setBusy(False)

    def onModel(self, index: int = 0) -> None:
        """Show the options of the model, each with a widget that suits its default."""
        while self.optionsForm.rowCount():
            self.optionsForm.removeRow(0)
        self.options = {}
        for name, default in self.models.get(self.model.currentText, {}).items():
            self.options[name] = optionWidget(default)
            self.optionsForm.addRow(name, self.options[name])

    def onApply(self) -> None:
        node = self.volume.currentNode()
        if node is None:
            slicer.util.errorDisplay("Choose the MR first.")
            return
        defaults = self.models[self.model.currentText]
        options = {name: optionValue(widget, defaults[name]) for name, widget in self.options.items()}
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "mr.nrrd"
        if not slicer.util.exportNode(node, str(path)):
            self.folder.cleanup()
            slicer.util.errorDisplay(f"{node.GetName()} cannot be written for sending.")
            return
        self.node, self.client, self.result, self.step = node, Client(self.address.text), None, ""
        self.thread = threading.Thread(
            target=self._work, args=(self.client, path, self.model.currentText, options), daemon=True
        )
        self.thread.start()
        self.setBusy(True)
        self.timer.start()

    def _work(self, client: Client, path: Path, model: str, options: dict[str, Any]) -> None:
        """Run in a thread, without Qt or MRML: store a result or an error for the timer."""
        try:
            self.result = client.synthesize(path, model, options, self.folder.name, self._report)
        except Exception as error:
            self.result = error

    def _report(self, step: str) -> None:
        self.step = step

    def onTimer(self) -> None:
        """Give the thread some time, because Qt's loop holds Python's lock; show its result once it is done."""
        self.thread.join(POLL / 2000)
        self.status.text = f"{self.step} ..."
        if self.thread.is_alive():
            return
        self.timer.stop()
        self.setBusy(False)
        try:
            if isinstance(self.result, Synthesis):
                self.show(self.result)
            else:
                self.status.text = str(self.result)
                slicer.util.errorDisplay(str(self.result))
        finally:
            self.folder.cleanup()

    def show(self, result: Synthesis) -> None:
        """Show the synthetic CT in a CT window over the MR, and load its uncertainty without showing it."""
        name = self.node.GetName()
        sct = slicer.util.loadVolume(str(result.volume), {"name": f"{name} synthetic CT"})
        display = sct.GetDisplayNode()
        display.AutoWindowLevelOff()
        display.SetWindowLevel(CT_WINDOW, CT_LEVEL)
        if result.uncertainty is not None:
            slicer.util.loadVolume(str(result.uncertainty), {"name": f"{name} synthetic CT SD", "show": False})
        slicer.util.setSliceViewerLayers(background=self.node, foreground=sct, foregroundOpacity=OPACITY)
        lines = [f"seed {result.info['seed']}, weights {(result.info['model_sha256'] or '')[:12]}"]
        self.status.text = "\n".join(lines + [f"warning: {warning}" for warning in result.info["warnings"]])

    def onCancel(self) -> None:
        if self.client is not None and self.thread is not None and self.thread.is_alive():
            self.client.cancel()


def optionWidget(default: Any) -> Any:
    """Make a check box, choice, number or text field, by the type of ``default``."""
    if isinstance(default, bool):
        widget = qt.QCheckBox()
        widget.checked = default
    elif isinstance(default, list):
        widget = qt.QComboBox()
        widget.addItems([str(item) for item in default])
    elif isinstance(default, int):
        widget = qt.QSpinBox()
        widget.setRange(0, 2**31 - 1)
        widget.value = default
    else:
        widget = qt.QLineEdit(str(default))
    return widget


def optionValue(widget: Any, default: Any) -> Any:
    """Return the value of a widget of :func:`optionWidget`; the server reads numbers from text."""
    if isinstance(default, bool):
        return bool(widget.checked)
    if isinstance(default, list):
        return widget.currentText
    return int(widget.value) if isinstance(default, int) else widget.text


class SyntheticCTTest(ScriptedLoadableModuleTest):
    """Test in 3D Slicer with a server on ADDRESS: synthesises a small volume."""

    def runTest(self) -> None:
        import numpy as np

        slicer.mrmlScene.Clear()
        values = np.random.default_rng(0).normal(500, 150, (24, 28, 32)).clip(0).astype(np.int16)
        mr = slicer.util.addVolumeFromArray(values, np.diag([-2.0, -2.0, 2.0, 1.0]), "MR")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mr.nrrd"
            slicer.util.exportNode(mr, str(path))
            client = Client(ADDRESS)
            model = next(iter(client.models()))
            result = client.synthesize(path, model, {"num_samples": 2}, folder)
            sct = slicer.util.loadVolume(str(result.volume))
            self.assertEqual(slicer.util.arrayFromVolume(sct).dtype, np.int16)
            self.assertEqual(slicer.util.arrayFromVolume(sct).shape, values.shape)
            self.assertIsNotNone(result.uncertainty)
        self.delayDisplay("Test passed")
