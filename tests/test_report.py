"""The report: one file that fetches nothing, with what there is of each patient, and what there is not said."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import save

from bundle.phantom.command import torso_phantom
from bundle.report import _bone_voxel, _text, report
from custom_modules.errors import InputError
from custom_modules.evaluation.metrics import PROTOCOLS
from custom_modules.evaluation.split import Evaluation
from custom_modules.files import write_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SMALL = {"shape": (44, 36, 40), "spacing": 8.0}
SETTINGS = {"seed": 0, "num_inference_steps": 1}


class Page(HTMLParser):
    """What a page is made of: tags, ids, texts, and all that it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.references: list[str] = []
        self.captions: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids |= {values["id"]} if "id" in values else set()
        self.references += [values[key] for key in ("src", "href", "srcset", "data", "action") if key in values]
        self.captions += [values["alt"]] if "alt" in values else []


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """The output of an evaluation of three patients: one with SD and warnings, one worse, one who has no CT in HU."""
    folder = tmp_path_factory.mktemp("report")
    entries = []
    for number in range(3):
        mr, ct, affine = torso_phantom(**SMALL, seed=number)
        entries.append({"image": f"<p{number}>/mr.nii.gz", "label": f"<p{number}>/ct.nii.gz"})
        save(folder / entries[-1]["image"], mr + 1, affine)
        save(folder / entries[-1]["label"], ct / 1000 if number == 2 else ct, affine)
        save(folder / "out" / f"<p{number}>_sct.nii.gz", ct + 20 * (number + 1) * np.sign(ct), affine)
        guard = {"warnings": ["spacing is 8 mm, in training 3.3 to 3.3 (9.0 SD away)"] * (number == 0)}
        record = {"input": str(folder / entries[-1]["image"]), "output": f"<p{number}>_sct.nii.gz"}
        write_json({**record, "settings": SETTINGS, "guard": guard}, folder / "out" / f"<p{number}>_sct.json")
    save(folder / "out" / "<p0>_sct_sd.nii.gz", np.random.default_rng(0).uniform(5, 60, ct.shape), affine)
    (folder / "datalist.json").write_text(json.dumps({"training": entries[:1], "test": entries}))
    out = str(folder / "out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        for metrics in PROTOCOLS.values():  # MS-SSIM pads every volume to 97 a side; it has its own tests
            patch.setitem(metrics, "ms_ssim", lambda pred, ct, mask: float("nan"))
        Evaluation(str(folder), None, "test", out, pred_dir=out).run()
    report(str(folder / "out"))
    return folder / "out"


@pytest.fixture(scope="module")
def page(scored) -> Page:
    return Page((scored / "report.html").read_text())


def test_nothing_is_fetched(page, scored):
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    text = (scored / "report.html").read_text()
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|https?:", text)


def test_every_patient_has_a_page_and_the_worst_comes_first(page, scored):
    links = [reference[1:] for reference in page.references if reference.startswith("#")]
    assert links == ["p--p2-", "p--p1-", "p--p0-"] and set(links) <= page.ids


def test_what_is_shown_of_a_patient(page):
    """The third has no synthetic CT that could be scored: its MR and CT alone are shown."""
    for words in ("through the bone with", "line through bone", "Joint histogram"):
        assert sum(words in caption for caption in page.captions) == 2, words
    assert sum("middle of the body" in caption for caption in page.captions) == 3
    assert sum("Sparsification" in caption for caption in page.captions) == 1


def test_warnings_problems_settings_and_baselines_stand_there_and_are_escaped(scored):
    text = (scored / "report.html").read_text()
    for words in ("9.0 SD away", "not Hounsfield units", "num_inference_steps", "MR lookup", "0 HU", "&lt;p0&gt;"):
        assert words in text
    assert "<p0>" not in text


def test_without_a_ct_what_can_be_shown_is_shown(tmp_path):
    mr, ct, affine = torso_phantom(**SMALL)
    save(tmp_path / "mr.nii.gz", mr, affine)
    save(tmp_path / "out" / "mr_sct.nii.gz", ct, affine)
    record = {"input": str(tmp_path / "mr.nii.gz"), "output": "mr_sct.nii.gz", "settings": SETTINGS, "guard": None}
    write_json(record, tmp_path / "out" / "mr_sct.json")
    report(str(tmp_path / "out"), str(tmp_path / "elsewhere" / "a.html"))
    text = (tmp_path / "elsewhere" / "a.html").read_text()
    assert len(Page(text).captions) == 2
    assert "No CT to compare with" in text and "not compared with the training set" in text


def test_a_volume_that_is_gone_is_said_and_the_others_are_shown(scored, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(scored, folder)
    summary = json.loads((folder / "metrics.json").read_text())
    summary["patients"]["<p1>"]["image"] = str(tmp_path / "gone.nii.gz")
    (folder / "metrics.json").write_text(json.dumps(summary))
    report(str(folder))
    text = (folder / "report.html").read_text()
    assert "gone.nii.gz: no such file" in text
    assert sum("middle of the body" in caption for caption in Page(text).captions) == 2


@pytest.mark.parametrize("name", ["none", "empty"])
def test_a_folder_with_nothing_in_it_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        report(str(tmp_path / name))


def test_what_is_not_defined_is_never_a_number():
    assert [_text(value) for value in ("nan", "", None, "inf", "0.12345")] == ["not defined", "", "", "inf", "0.123"]


def test_the_profile_goes_through_the_largest_error_in_the_mask():
    weight = np.zeros((20, 20, 20))
    weight[4:7, 4:7, 4:7], weight[14:17, 14:17, 14:17] = 100, 900
    mask = np.zeros(weight.shape, bool)
    assert _bone_voxel(weight, mask) is None
    mask[:10] = True
    assert _bone_voxel(weight, mask) == (5, 5, 5)
    assert _bone_voxel(weight, ~mask) == (15, 15, 15)


# in a browser


def rendered(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The page as headless Chromium has it in the end, and what stands on its console; fetches that the page's policy
    blocks stand there too."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={folder / 'profile'}", "--disable-background-networking", "--no-first-run"]
    command += [f"--screenshot={folder / 'page.png'}", "--window-size=1300,2400", "--dump-dom", page.as_uri()]
    environment = {**os.environ, "HOME": str(folder)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")
def test_chromium_renders_it_without_a_fetch_or_an_error(scored, tmp_path):
    dom, console = rendered(scored / "report.html", tmp_path)
    assert console == []
    assert dom.count("<figure>") == len(Page((scored / "report.html").read_text()).captions)
    assert (tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")
def test_chromium_tells_of_a_fetch(scored, tmp_path):
    text = (scored / "report.html").read_text().replace("<h1>", "<img src='http://127.0.0.1:9/a.png'><h1>", 1)
    (tmp_path / "a.html").write_text(text)
    assert any("a.png" in line for line in rendered(tmp_path / "a.html", tmp_path)[1])
