"""The archive for the model zoo: what is in it, and that it works with nothing else there."""

from __future__ import annotations

import ast
import importlib.metadata as packages
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, files_in

from bundle.release import package as package_module
from bundle.release import verification
from bundle.release.package import build, package
from bundle.release.verification import Failure, check_contents, check_metadata, check_weights
from custom_modules.errors import InputError

METADATA = json.loads((ROOT / "configs/metadata.json").read_text())
NAME = f"{METADATA['name']}_v{METADATA['version']}"


def commit(repository: Path, date: str = "2025-01-02T03:04:05+0000") -> None:
    environment = {**os.environ, "GIT_COMMITTER_DATE": date, "GIT_AUTHOR_DATE": date}
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", str(repository), *command], check=True, env=environment)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The bundle as it stands, and a file that does not belong into the archive, committed."""
    repository = tmp_path / "repository"
    for part in verification.PARTS:
        source, target = ROOT / part, repository / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.plan"))
        else:
            repository.mkdir(exist_ok=True)
            shutil.copy(source, target)
    (repository / "notes.txt").write_text("not for the zoo")
    commit(repository)
    return repository


def test_the_archive_of_the_bundle_passes_every_check_in_a_process_of_its_own(repository, tmp_path, capsys):
    package(str(tmp_path / "dist"), root=str(repository))
    assert files_in(tmp_path / "dist") == [f"{NAME}.zip"]
    said = capsys.readouterr().out
    for check in verification.checks(ROOT, ROOT, ROOT, None):
        assert f"  {check}" in said
    with zipfile.ZipFile(tmp_path / "dist" / f"{NAME}.zip") as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    assert {name.split("/")[0] for name in names} == {METADATA["name"]}
    assert {name.split("/")[1] for name in names} == set(verification.PARTS)


def test_the_same_commit_gives_the_same_bytes_wherever_and_whenever(repository, tmp_path, monkeypatch):
    first = build(repository, tmp_path).read_bytes()
    shutil.move(repository, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere" / "configs").iterdir():
        os.utime(path, (0, 0))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    (tmp_path / "again").mkdir()
    assert build(tmp_path / "elsewhere", tmp_path / "again").read_bytes() == first


def test_what_is_not_committed_is_refused_by_name(repository, tmp_path):
    (repository / "configs" / "new.yaml").write_text("a: 1")
    with pytest.raises(InputError, match="configs/new.yaml not committed"):
        package(str(tmp_path / "dist"), root=str(repository))
    assert files_in(tmp_path / "dist") == []


def test_a_folder_that_is_no_repository_is_one_line(tmp_path):
    with pytest.raises(InputError, match="not a git repository"):
        build(tmp_path, tmp_path)


def test_a_module_that_needs_the_repository_fails_and_leaves_no_archive(repository, tmp_path):
    """`bundle` can be imported here, and is not in the archive."""
    with (repository / "custom_modules" / "networks" / "synthesizer.py").open("a") as file:
        file.write("\nimport bundle.phantom.command\n")
    commit(repository)
    with pytest.raises(InputError, match="data shape of network_def: .*No module named 'bundle'"):
        package(str(tmp_path / "dist"), root=str(repository))
    assert files_in(tmp_path / "dist") == [f"{NAME}.log"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundle's parts with weights of one byte, unpacked."""
    root = tmp_path / "unpacked"
    for part in ("configs", "custom_modules", "docs", "models"):
        (root / part).mkdir(parents=True)
    (root / "LICENSE").touch()
    (root / "models/model.pt").write_bytes(b"w")
    digest = "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"  # of "w", by sha256sum
    (root / "models/model.pt.sha256").write_text(f"{digest}  model.pt\n")
    (root / "models/calibration.json").write_text(json.dumps({"model_sha256": digest}))
    (root / "configs/metadata.json").write_text(json.dumps(METADATA))
    return root


def test_weights_that_are_what_their_hash_says_pass(folder):
    assert "50e721e49c01" in check_weights(folder)
    assert check_contents(folder).startswith("5 files")


def test_weights_of_another_hash_fail(folder):
    (folder / "models/model.pt").write_bytes(b"v")
    with pytest.raises(Failure, match="model.pt has SHA-256 .* models/model.pt.sha256 says 50e721e49c01"):
        check_weights(folder)


def test_a_calibration_of_other_weights_fails(folder):
    (folder / "models/calibration.json").write_text(json.dumps({"model_sha256": "0" * 64}))
    with pytest.raises(Failure, match="models/calibration.json says 000000000000"):
        check_weights(folder)


def test_weights_that_monai_label_would_load_instead_fail(folder):
    (folder / "models/a.pt").touch()
    with pytest.raises(Failure, match="models/a.pt is not longer than model.pt"):
        check_weights(folder)


def test_a_file_above_the_limit_of_the_zoo_fails(folder):
    with (folder / "docs/film.png").open("wb") as file:
        file.truncate(25_000_001)
    with pytest.raises(Failure, match="docs/film.png has 25.0 MB"):
        check_contents(folder)


def test_a_part_too_many_or_too_few_fails(folder):
    (folder / "bundle").mkdir()
    with pytest.raises(Failure, match="holds LICENSE, bundle, configs"):
        check_contents(folder)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("version", "9.9.9", "version 9.9.9 is not in its changelog"),
        ("intended_use", None, "lacks intended_use"),
        ("network_data_format", {"inputs": {}}, "network_data_format#inputs#image#type"),
    ],
)
def test_metadata_that_lack_something_fail(folder, tmp_path, key, value, complaint):
    metadata = {k: v for k, v in {**METADATA, key: value}.items() if v is not None}
    (folder / "configs/metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(Failure, match=complaint):
        check_metadata(folder, None, tmp_path)


def test_where_the_schema_cannot_be_fetched_the_report_says_so(folder, tmp_path):
    metadata = {**METADATA, "schema": "http://127.0.0.1:9/schema.json"}
    (folder / "configs/metadata.json").write_text(json.dumps(metadata))
    assert check_metadata(folder, None, tmp_path).startswith("required keys only, its schema is not available")


def test_metadata_against_a_schema_that_they_break_fail(folder, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"task": {"type": "integer"}}}))
    with pytest.raises(ValueError, match="Failed validating"):
        check_metadata(folder, schema, tmp_path)


def test_a_schema_that_is_not_there_is_refused_before_anything_is_built(tmp_path):
    with pytest.raises(InputError, match="no such schema"):
        package(str(tmp_path / "dist"), schema=str(tmp_path / "none.json"))
    assert not (tmp_path / "dist").exists()


def test_a_process_that_dies_is_a_failure(tmp_path, monkeypatch):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("bundle_name/LICENSE", "")
    monkeypatch.setattr(package_module.sys, "executable", shutil.which("false"))
    with pytest.raises(InputError, match="a.zip: ended with 1"):
        package_module.verify(archive, tmp_path / "scratch", tmp_path / "log")


def requirements() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_versions_in_the_metadata_are_those_of_the_requirements():
    pins = requirements()
    stated = {**METADATA["required_packages_version"], "monai": METADATA["monai_version"]}
    stated |= {"torch": METADATA["pytorch_version"], "numpy": METADATA["numpy_version"]}
    assert {name: pins.get(name) for name in stated} == stated


def test_the_metadata_name_every_package_that_the_modules_import():
    owners = packages.packages_distributions()
    named = {*METADATA["required_packages_version"], "monai", "torch", "numpy"}
    for path in (ROOT / "custom_modules").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [node.module] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in {name.split(".")[0] for name in imported} - {"custom_modules", *sys.stdlib_module_names}:
                assert named & {module, *owners.get(module, [])}, f"{path.name}: {module}"


@pytest.mark.parametrize("page", ("docs/README.md", "docs/evaluation.md"))
def test_a_page_of_scores_names_the_weights_that_are_shipped(page):
    digest = (ROOT / "models" / "model.pt.sha256").read_text().split()[0]
    named = re.findall(r"weights\s+([0-9a-f]{8})\b", (ROOT / page).read_text())
    assert named == [digest[:8]]


def test_the_metrics_in_the_metadata_are_those_of_the_evaluation():
    """The numbers of docs/evaluation.md, by the names of metrics.json."""
    from custom_modules.evaluation.split import SHOWN

    text = (ROOT / "docs" / "evaluation.md").read_text()
    for name, value in METADATA["eval_metrics"].items():
        protocol, metric = name.split("_", 1)
        assert protocol in ("paper", "synthrad2025") and metric in SHOWN, name
        assert f"| {value}" in text.replace("**", ""), (name, value)
