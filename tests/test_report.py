"""The report: one file that fetches nothing, with what there is of each patient, and what there is not said."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import save

from bundle.phantom.command import torso_phantom
from bundle.report.command import report
from bundle.report.figures import bone_voxel
from bundle.report.tables import Column, by_tissue, cell, scores
from custom_modules.errors import InputError
from custom_modules.evaluation.metrics import PROTOCOLS
from custom_modules.evaluation.split import Evaluation
from custom_modules.files import write_json

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
    assert not {"iframe", "object", "embed", "base", "form"} & set(page.tags)
    text = re.sub(r'<script type="text/plain" id="niivue">.*?</script>', "", (scored / "report.html").read_text())
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|https?:", text)


def test_every_patient_has_a_page_and_the_worst_comes_first(page, scored):
    links = [reference[1:] for reference in page.references if reference.startswith("#")]
    ids = [f"p-_3c_p{number}_3e_" for number in (2, 1, 0)]
    assert [link for link in links if link][:3] == ids and set(ids) <= page.ids


def test_what_is_shown_of_a_patient(page):
    """The third has no synthetic CT that could be scored: its MR and CT alone are shown."""
    for words, number in (("through the bone with", 3), ("line through bone", 1), ("Joint histogram", 1)):
        assert sum(words in caption for caption in page.captions) == 2 * number, words
    assert sum("middle of the body" in caption for caption in page.captions) == 9  # three planes each
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
    write_json({"acf": {"mean": 0.0}, "lesion": {"mean": -3.257}}, tmp_path / "out" / "mr_sct_pet.json")
    report(str(tmp_path / "out"), str(tmp_path / "elsewhere" / "a.html"))
    text = (tmp_path / "elsewhere" / "a.html").read_text()
    assert len([caption for caption in Page(text).captions if caption]) == 5  # planes, histogram, profile
    assert all(words in text for words in ("correction factors", ">0.00<", "activity, lesions", ">-3.26<"))
    assert "photons, gamma" not in text  # was not made
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
    assert sum("middle of the body" in caption for caption in Page(text).captions) == 6


@pytest.mark.parametrize("name", ["none", "empty"])
def test_a_folder_with_nothing_in_it_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        report(str(tmp_path / name))


def test_two_patients_of_one_name_in_two_folders_are_two(tmp_path):
    mr, ct, affine = torso_phantom(**SMALL)
    for folder in ("A", "B"):
        save(tmp_path / folder / "mr.nii.gz", mr, affine)
        save(tmp_path / "out" / folder / "mr_sct.nii.gz", ct, affine)
        record = {"input": str(tmp_path / folder / "mr.nii.gz"), "output": "mr_sct.nii.gz", "settings": SETTINGS}
        write_json(record, tmp_path / "out" / folder / "mr_sct.json")
    report(str(tmp_path / "out"), viewer_mb=0)
    found = Page((tmp_path / "out" / "report.html").read_text())
    links = [reference[1:] for reference in found.references if reference.startswith("#p")]
    assert len(set(links)) == 2 and set(links) <= found.ids and "script" in found.tags
    assert "A/mr_sct" in (tmp_path / "out" / "report.html").read_text()


def test_without_the_viewer_the_pictures_stay_and_the_page_says_so(scored, tmp_path, monkeypatch):
    monkeypatch.setattr("bundle.report.command.packed_script", lambda: None)
    report(str(scored), str(tmp_path / "a.html"))
    text = (tmp_path / "a.html").read_text()
    assert "no interactive viewer: install it" in text and 'data-layers="' not in text
    assert sum("middle of the body" in caption for caption in Page(text).captions) == 9


def test_what_is_not_defined_is_never_a_number():
    assert [cell(value, 3).text for value in ("nan", "", None, "inf", "0.12345")] == [
        "not defined",
        "",
        "",
        "inf",
        "0.123",
    ]
    assert [cell(value, 3).value for value in ("nan", "", None, "inf")] == ["", "", "", ""]


def test_best_and_worst_of_a_column_follow_what_is_better():
    rows = {"a": {"x": 3, "y": -4, "z": 0.1}, "b": {"x": 1, "y": 9, "z": 0.5}, "c": {"x": 2, "y": 1, "z": "nan"}}
    columns = {
        "x": Column("x", 1, "low"),
        "y": Column("y", 0, "zero"),
        "z": Column("z", 2, "high"),
        "w": Column("w", 0),
    }
    table = scores(rows, columns, "name")
    assert table.head == ["name", "x", "y", "z"]
    marks = [[each.mark for each in row[1:]] for row in table.rows]
    assert marks == [["worst", "", ""], ["best", "worst", ""], ["", "best", ""]]  # two values have no best


def test_hu_by_tissue_are_those_of_the_voxels():
    ct = np.array([-900.0, -800, 0, 100, 500, 700])
    sct = ct + [10, -10, 20, 20, -100, -300]
    mask = np.array([True, False, True, True, True, True])
    rows = {row[0].text: [each.value for each in row[1:]] for row in by_tissue(ct, sct, mask, 0.5).rows}
    assert rows["air"] == [0.5, -900, -890, 10, 10]
    assert rows["soft"] == [1.0, 50, 70, 20, 20]
    assert rows["bone"] == [1.0, 600, 400, -200, 200]


def test_the_profile_goes_through_the_largest_error_in_the_mask():
    weight = np.zeros((20, 20, 20))
    weight[4:7, 4:7, 4:7], weight[14:17, 14:17, 14:17] = 100, 900
    mask = np.zeros(weight.shape, bool)
    assert bone_voxel(weight, mask) is None
    mask[:10] = True
    assert bone_voxel(weight, mask) == (5, 5, 5)
    assert bone_voxel(weight, ~mask) == (15, 15, 15)


# in a browser


def test_the_page_opens_sorts_and_shows_the_values_of_the_files(scored, watch):
    watched = watch()
    page = watched.open(scored / "report.html")
    viewer = watched.open_viewer("#p-_3c_p1_3e_-viewer")
    found = page.evaluate("viewer.values()")
    sct = nib.load(scored / "<p1>_sct.nii.gz")
    names = page.evaluate("viewer.layers.map((layer) => layer.name)")
    voxel = nib.affines.apply_affine(np.linalg.inv(sct.affine), found["mm"]).round().astype(int)
    assert found["values"][names.index("synthetic CT")] == np.asarray(sct.dataobj)[tuple(voxel)]
    assert "HU" in viewer.locator("[data-part=values]").text_content()
    column = page.locator("table.sortable").first
    column.locator("th button").nth(1).click()
    values = [float(text) for text in column.locator("tbody tr td:nth-child(2)").all_inner_texts() if text]
    assert len(values) > 1 and values == sorted(values)
    assert watched.outside() == [] and watched.console == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(scored, watch, scheme):
    page = watch(420, color_scheme=scheme).open(scored / "report.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_a_fetch_would_be_seen(scored, watch, tmp_path):
    text = (scored / "report.html").read_text().replace("<h1>", "<img src='http://127.0.0.1:9/a.png'><h1>", 1)
    (tmp_path / "a.html").write_text(text)
    watched = watch()
    watched.open(tmp_path / "a.html")
    assert any("a.png" in line for line in watched.console + watched.outside())
