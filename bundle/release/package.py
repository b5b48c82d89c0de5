"""``python -m bundle package``: the bundle as an archive for the model zoo, built from a commit and verified on its
own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib

from bundle.phantom.command import torso_phantom
from bundle.release import verification
from bundle.workflow import ROOT
from custom_modules.errors import InputError
from custom_modules.files import sha256, writable_or_stop

# of the phantoms: a slab of a torso, so that a step with networks of full size takes seconds
PHANTOM: dict[str, Any] = {"shape": (40, 30, 8), "spacing": 8.0}
SPLITS = {"training": 2, "validation": 1, "test": 1}


def package(output: str = "dist", schema: str | None = None, root: str = str(ROOT)) -> None:
    """Build ``OUTPUT/<name>_v<version>.zip`` from the committed files, with identical bytes for the same commit. Verify
    it in an empty folder by a process that cannot import anything else of the repository.

    Args:
        output: folder; an archive that fails a check is removed.
        schema: a copy of MONAI's metadata schema; by default it is fetched from the address in the metadata.
        root: the repository.

    Raises:
        InputError: for changes that are not committed, or for the first check that fails.
    """
    if schema is not None and not Path(schema).is_file():
        raise InputError(f"{schema}: no such schema")
    folder = Path(writable_or_stop(output))
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".package") as staging,
        tempfile.TemporaryDirectory() as scratch,
    ):
        archive = build(Path(root), Path(staging))
        print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB, being verified")
        log = folder / f"{archive.stem}.log"
        try:
            verify(archive, Path(scratch), log, Path(schema).resolve() if schema else None)
        except InputError as error:
            raise InputError(f"{error} ({log})") from error
        log.unlink()
        os.replace(archive, folder / archive.name)
    digest = sha256(folder / archive.name)
    print(f"{folder / archive.name}: SHA-256 {digest}")


def git(root: Path, *arguments: str) -> str:
    """Return the output of a git command in ``root``, independent of local git settings.

    Raises:
        InputError: when git is not installed or fails.
    """
    environment = {**os.environ, "TZ": "UTC", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    try:
        command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise InputError("git is not installed; an archive is built from a commit") from error
    except subprocess.CalledProcessError as error:
        raise InputError(f"{root}: {(error.stderr.strip().splitlines() or ['git failed'])[0]}") from error


def build(root: Path, folder: Path) -> Path:
    """Build the archive of HEAD in ``folder``. All files are in one folder with the bundle's name, as the zoo expects;
    order, times (of the commit) and permissions are those of ``git archive``.

    Raises:
        InputError: if something that belongs into it is not committed.
    """
    changed = git(root, "status", "--porcelain", "--", *verification.PARTS).splitlines()
    if changed:
        names = ", ".join(line[3:] for line in changed)
        raise InputError(f"{root}: {names} not committed; an archive is built from a commit")
    metadata = json.loads(git(root, "show", "HEAD:configs/metadata.json"))
    archive = folder / f"{metadata['name']}_v{metadata['version']}.zip"
    options = ["--format=zip", "-9", f"--prefix={metadata['name']}/", f"--output={archive.resolve()}"]
    git(root, "archive", *options, "HEAD", *verification.PARTS)
    return archive


def phantoms(folder: Path) -> Path:
    """Write phantom pairs and their datalist, on which the workflows are run."""
    entries: dict[str, list[dict[str, str]]] = {}
    names = [(split, f"{split}{n}") for split, count in SPLITS.items() for n in range(count)]
    for seed, (split, name) in enumerate(names):
        mr, ct, affine = torso_phantom(**PHANTOM, seed=seed)
        (folder / name).mkdir(parents=True)
        for file, volume in (("mr", mr), ("ct", ct)):
            nib.save(nib.Nifti1Image(volume, affine), folder / name / f"{file}.nii.gz")
        entries.setdefault(split, []).append({"image": f"{name}/mr.nii.gz", "label": f"{name}/ct.nii.gz"})
    (folder / "datalist.json").write_text(json.dumps(entries))
    return folder


def verify(archive: Path, scratch: Path, log: Path, schema: Path | None = None) -> None:
    """Unpack ``archive`` and run :mod:`bundle.release.verification` there. Its lines are printed at once; messages of
    the workflows go to ``log``.

    Raises:
        InputError: for the first check that fails.
    """
    with zipfile.ZipFile(archive) as file:
        file.extractall(scratch / "unpacked")
    (root,) = (scratch / "unpacked").iterdir()
    data = phantoms(scratch / "data")
    command = [sys.executable, "-E", "-P", verification.__file__, str(data.resolve()), str(scratch.resolve())]
    command += [str(schema)] if schema else []
    last = ""
    with log.open("w") as stderr, subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as process:  # fmt: skip
        for line in process.stdout:  # type: ignore[union-attr]
            last = line.rstrip()
            if not last.startswith("failed: "):
                print(last, flush=True)
    if process.returncode:
        reason = last.removeprefix("failed: ") if last.startswith("failed: ") else f"ended with {process.returncode}"
        raise InputError(f"{archive.name}: {reason}")
