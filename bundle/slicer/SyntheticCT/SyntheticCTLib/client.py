"""Client of the bundle's MONAI Label server. It uses the standard library only, so it runs in the Python of 3D Slicer
and in any other."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import uuid
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit


class ServerError(Exception):
    """The server refused a request, or does not respond; the message is one sentence for the user."""


@dataclass(frozen=True)
class Synthesis:
    """Result of a synthesis.

    Args:
        volume: file of the synthetic CT, int16 HU on the MR's grid; the first slice of a DICOM series.
        uncertainty: file of its standard deviation in HU; None for one sample.
        info: information from the server, such as ``seed``, ``model_sha256`` and ``warnings``.
    """

    volume: Path
    uncertainty: Path | None
    info: dict[str, Any]


class Client:
    """One request at a time to the server at ``address``, such as ``http://127.0.0.1:8000``.

    Args:
        timeout: seconds without a response; a synthesis takes minutes, and the server handles requests in turn.

    Raises:
        ServerError: from every method, when the server refuses, cannot be reached, or :meth:`cancel` was called.
    """

    def __init__(self, address: str, timeout: float | None = None) -> None:
        self.timeout, self.address = timeout, address.strip().rstrip("/")
        try:
            parts = urlsplit(self.address)
            self.kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[parts.scheme]
            self.host, self.port, self.path = parts.hostname, parts.port, parts.path
        except (KeyError, ValueError) as error:
            raise ServerError(f"'{address}' is not an address; give one such as http://127.0.0.1:8000") from error
        self.cancelled = False
        self.connection: http.client.HTTPConnection | None = None

    def models(self) -> dict[str, dict[str, Any]]:
        """Return the models of the server, each with its options: default by name, where a list is a choice."""
        info = self._json("GET", "/info/")
        return {name: model["config"] for name, model in info["models"].items()}

    def upload(self, path: str | Path, image_id: str) -> None:
        """Send a volume to the server's datastore."""
        self._json("PUT", f"/datastore/image?{urlencode({'image': image_id})}", file=Path(path))

    def remove(self, image_id: str) -> None:
        """Delete an image and its labels from the datastore."""
        self._json("DELETE", f"/datastore/image?{urlencode({'id': image_id})}")

    def infer(self, model: str, image_id: str, options: Mapping[str, Any], target: str | Path) -> dict[str, Any]:
        """Synthesise the CT of an image of the datastore into the file ``target``; return the information from the
        server."""
        fields = {"params": json.dumps({**options, "result_extension": "".join(Path(target).suffixes)})}
        selector = f"/infer/{quote(model, safe='')}?{urlencode({'image': image_id})}"
        content_type, body = self._request("POST", selector, fields)
        parts = _parts(content_type, body)
        if not {"params", "image"} <= parts.keys():
            raise ServerError(f"{self.address} did not send a volume")
        Path(target).write_bytes(parts["image"])
        return json.loads(parts["params"])

    def label(self, label: str, tag: str, target: str | Path) -> Path:
        """Fetch a label of the datastore into the file ``target``."""
        _, body = self._request("GET", f"/datastore/label?{urlencode({'label': label, 'tag': tag})}")
        Path(target).write_bytes(body)
        return Path(target)

    def synthesize(
        self, path: str | Path, model: str, options: Mapping[str, Any], folder: str | Path,
        report: Callable[[str], None] = lambda step: None,
    ) -> Synthesis:  # fmt: skip
        """Send the MR in ``path``, and fetch its synthetic CT and, with several samples, their standard deviation into
        ``folder``; everything is removed from the datastore afterwards.

        Args:
            report: called with a description of each step as it begins.
        """
        image_id = f"slicer_{uuid.uuid4().hex[:12]}"
        try:
            report("sending the MR")
            self.upload(path, image_id)
            report("synthesising")
            volume = Path(folder) / ("sct.zip" if options.get("dicom") else "sct.nrrd")
            info = self.infer(model, image_id, options, volume)
            if volume.suffix == ".zip":
                volume = unpack(volume)
            spread = info.get("uncertainty")
            if spread:
                report("fetching the uncertainty")
                spread = self.label(spread["label"], spread["tag"], Path(folder) / "uncertainty.nrrd")
        finally:
            # after a cancelled request the server responds only when it is done with it; do not wait for that
            removal = threading.Thread(target=self._remove, args=(image_id,), daemon=True)
            removal.start()
            if not self.cancelled:
                removal.join()
        return Synthesis(volume, spread, info)

    def _remove(self, image_id: str) -> None:
        with suppress(ServerError):  # a server that cannot be reached has been reported already
            Client(self.address).remove(image_id)

    def cancel(self) -> None:
        """Cancel the request that another thread waits for; the server finishes its work and discards the result."""
        self.cancelled = True
        if self.connection is not None and self.connection.sock is not None:
            with suppress(OSError):  # closed by the other end just now
                self.connection.sock.shutdown(socket.SHUT_RDWR)

    def _json(self, method: str, selector: str, file: Path | None = None) -> Any:
        _, body = self._request(method, selector, {"params": "{}"} if file else None, file)
        try:
            return json.loads(body)
        except ValueError as error:
            raise ServerError(f"{self.address} is not a MONAI Label server") from error

    def _request(
        self, method: str, selector: str, fields: Mapping[str, str] | None = None, file: Path | None = None
    ) -> tuple[str, bytes]:
        """Send a request, with ``fields`` and a file as a form; return content type and body of the response."""
        headers, form = {}, None
        if fields is not None:
            boundary = uuid.uuid4().hex
            headers, form = {"Content-Type": f"multipart/form-data; boundary={boundary}"}, _form(boundary, fields, file)
        self.connection = self.kind(self.host, self.port, timeout=self.timeout)
        try:
            if self.cancelled:
                raise ServerError("cancelled")
            self.connection.request(method, self.path + selector, form, headers)
            response = self.connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            if self.cancelled:
                raise ServerError("cancelled") from error
            raise ServerError(f"no response from {self.address} ({error}); is the server running, or busy?") from error
        finally:
            self.connection.close()
        if response.status >= 400:
            raise ServerError(_detail(body) or f"{self.address} returned {response.status} {response.reason}")
        return response.getheader("Content-Type", ""), body


def unpack(archive: Path) -> Path:
    """Unpack a DICOM series beside its archive; return its first slice, by which 3D Slicer loads all."""
    folder = archive.with_suffix("")
    try:
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
    except zipfile.BadZipFile as error:
        raise ServerError(f"{archive.name}: the server did not send a DICOM series") from error
    return min(folder.iterdir())


def _detail(body: bytes) -> str:
    """Return the message of a refusal in FastAPI's format."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return ""


def _form(boundary: str, fields: Mapping[str, str], file: Path | None) -> bytes:
    """Encode multipart/form-data (RFC 7578)."""
    parts = [(f'name="{name}"', value.encode()) for name, value in fields.items()]
    if file is not None:
        extension = "".join(file.suffixes[-2:] if file.name.endswith(".gz") else file.suffixes[-1:])
        parts.append((f'name="file"; filename="image{extension}"', file.read_bytes()))
    head = f"--{boundary}\r\nContent-Disposition: form-data; "
    form = [f"{head}{name}\r\n\r\n".encode() + value + b"\r\n" for name, value in parts]
    return b"".join([*form, f"--{boundary}--\r\n".encode()])


def _parts(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the parts of a multipart response by name."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    found = {}
    for part in body.split(b"--" + boundary[1].encode())[1:-1] if boundary else []:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]*)"', head)
        if name:
            found[name[1].decode()] = content[:-2]
    return found
