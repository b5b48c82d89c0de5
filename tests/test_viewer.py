"""The viewer: what is stored of the volumes, and in a browser that layers, windows and values are the files'."""

from __future__ import annotations

import base64
import gzip
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ramp, save

from bundle.pages import niivue
from bundle.pages.layers import layers, scale_end
from bundle.pages.render import anchor, render
from bundle.synthesis import picture, shown, write_page

AFFINE = np.array([[0, -1.5, 0, 40], [1.2, 0, 0, -9], [0, 0, 3, 7], [0, 0, 0, 1]])  # axes swapped, one flipped
SHAPE = (40, 36, 20)


def stored(layer) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(layer.data)))


def test_hu_are_stored_as_they_are_and_an_mr_and_sd_to_a_step():
    rng = np.random.default_rng(0)
    hu, mr, sd = rng.integers(-1000, 1600, SHAPE), rng.uniform(0, 3e-3, SHAPE), rng.uniform(0, 300, SHAPE)
    made, note = layers({"CT": (hu, "HU"), "MR": (mr, "MR"), "SD": (sd, "SD")}, AFFINE)
    found = [stored(layer) for layer in made]
    np.testing.assert_array_equal(found[0].get_fdata(), hu)
    assert np.abs(found[1].get_fdata() - mr).max() <= mr.max() / 32000
    assert np.abs(found[2].get_fdata() - sd).max() <= 0.0501
    for image in found:
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
        assert image.header.get_xyzt_units()[0] == "mm"
    assert "own grid" in note


def test_what_is_too_large_is_resampled_to_2_mm_or_left_out_and_the_note_says_so():
    rng, affine = np.random.default_rng(0), np.diag([0.5, 1.0, 4.0, 1])
    volumes = {"MR": (rng.integers(0, 1000, (64, 40, 10)).astype(np.float32), "MR")}
    whole = len(layers(volumes, affine)[0][0].data) / 1e6
    made, note = layers(volumes, affine, limit_mb=0.6 * whole)
    np.testing.assert_allclose(nib.affines.voxel_sizes(stored(made[0]).affine), [2, 2, 4])
    assert "resampled to 2 mm" in note and len(made[0].data) / 1e6 < 0.6 * whole
    made, note = layers(volumes, affine, limit_mb=0.01 * whole)
    assert made == [] and "only the pictures" in note


def test_a_scale_leaves_half_a_percent_of_the_errors_beyond_its_end():
    error = np.concatenate([np.linspace(-310, 310, 1000), [np.nan, 3000.0]])
    assert scale_end(error, "error") == 350 and np.mean(np.abs(error[:-2]) > 350) < 0.005
    assert scale_end(np.zeros(5), "SD") == 50 and scale_end(np.full(5, np.nan), "error") == 50


def test_names_that_differ_have_anchors_that_differ():
    names = ["A/mr", "B/mr", "A-mr", "A_mr", "A mr", "A_2f_mr", "é"]
    anchors = [anchor(name) for name in names]
    assert len(set(anchors)) == len(names) and all(re.fullmatch(r"[\w-]+", each) for each in anchors)


def test_text_in_a_page_is_escaped():
    page = render("message.html", title="<b>", text="<script>x</script>", with_viewer=False)
    assert "<b>" not in page and "<script>x" not in page and "&lt;b&gt;" in page


@pytest.mark.parametrize("content", [None, "another version"])
def test_without_niivue_there_is_no_script_and_a_warning_says_how_to_get_it(tmp_path, monkeypatch, caplog, content):
    (tmp_path / "widget.js").write_text(content or "")
    monkeypatch.setattr(niivue, "files", lambda name: [tmp_path / "widget.js"] if content else [])
    assert niivue.script.__wrapped__() is None
    assert "requirements-viewer.txt" in caplog.text


# in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of a synthesis, with warnings and an SD."""
    if niivue.packed_script() is None:
        pytest.skip("needs NiiVue (requirements-viewer.txt)")
    folder, rng = tmp_path_factory.mktemp("view"), np.random.default_rng(1)
    mr = save(folder / "mr.nii.gz", ramp(SHAPE, AFFINE), AFFINE)
    sct = save(folder / "mr_sct.nii.gz", rng.integers(-1000, 1600, SHAPE).astype(np.int16), AFFINE)
    save(folder / "mr_sct_sd.nii.gz", rng.uniform(0, 200, SHAPE).astype(np.float32), AFFINE)
    (folder / "mr_sct.json").write_text('{"guard": {"warnings": ["field of view is <small>"]}}')

    picture(mr, sct)
    return write_page(mr, sct)


def voxel(path: Path, mm: list[float]) -> float:
    image = nib.load(path)
    index = nib.affines.apply_affine(np.linalg.inv(image.affine), mm).round().astype(int)
    return float(image.get_fdata()[tuple(index)])


def test_the_values_under_the_crosshair_are_those_of_the_files(page, watch):
    watched = watch()
    view = watched.open(page)
    viewer = watched.open_viewer()
    canvas = viewer.locator("canvas").bounding_box()
    places = []
    for x, y in ((0.15, 0.4), (0.2, 0.5), (0.5, 0.3), (0.8, 0.6)):
        view.mouse.click(canvas["x"] + x * canvas["width"], canvas["y"] + y * canvas["height"])
        found = view.evaluate("viewer.values()")
        places.append(tuple(np.round(found["mm"], 2)))
        assert found["values"][1] == voxel(page.with_name("mr_sct.nii.gz"), found["mm"])
        assert found["values"][0] == pytest.approx(voxel(page.with_name("mr.nii.gz"), found["mm"]), abs=0.05)
        assert found["values"][2] == pytest.approx(voxel(page.with_name("mr_sct_sd.nii.gz"), found["mm"]), abs=0.06)
        assert f"synthetic CT {round(found['values'][1])} HU" in viewer.locator("[data-part=values]").text_content()
    assert len(set(places)) > 2
    assert watched.outside() == [] and watched.console == []


def test_the_slider_fades_the_upper_layer_over_the_lower(page, watch):
    watched = watch()
    view = watched.open(page)
    viewer = watched.open_viewer()
    pictures = {}
    for share in (0, 50, 100):
        viewer.locator("[data-part=fade]").evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", share
        )
        assert view.evaluate("viewer.nv.volumes.map((volume) => volume.opacity)") == [1, share / 100]
        pictures[share] = viewer.locator("canvas").screenshot()
    assert len(set(pictures.values())) == 3


def test_windows_keys_and_layers(page, watch):
    watched = watch()
    view = watched.open(page)
    viewer = watched.open_viewer()
    window = "[viewer.nv.volumes[1].cal_min, viewer.nv.volumes[1].cal_max]"
    assert view.evaluate(window) == [-160, 240]
    viewer.locator("[data-window=bone]").click()
    assert view.evaluate(window) == [-450, 1050]
    viewer.locator("canvas").focus()
    view.keyboard.press("3")
    assert view.evaluate(window) == [-1350, 150]
    view.keyboard.press("ArrowDown")  # from between two voxels to the middle of one
    before = view.evaluate("viewer.values().mm")
    for key, step in (("ArrowLeft", (1.5, 0, 0)), ("ArrowUp", (0, 1.2, 0)), ("PageUp", (0, 0, 3))):
        view.keyboard.press(key)  # right, front, head: the patient's right is on the left of the screen
        after = view.evaluate("viewer.values().mm")
        np.testing.assert_allclose(np.subtract(after, before), step, atol=0.01)
        before = after
    viewer.locator("[data-part=above]").select_option(label="SD")
    assert view.evaluate("[viewer.below, viewer.above]") == [0, 2]
    assert viewer.locator("[data-part=difference]").is_hidden()  # there is no CT
    assert watched.console == []


def test_warnings_are_shown_as_text(page, watch):
    view = watch(420).open(page)
    assert "field of view is <small>" in view.locator(".warning").first.inner_text()
    assert view.evaluate("document.documentElement.scrollWidth") <= 420


def test_without_javascript_a_sentence_and_the_picture(page, watch):
    view = watch(java_script_enabled=False).open(page)
    assert view.locator("noscript").inner_text().startswith("The interactive viewer needs JavaScript")
    assert view.locator("figure img").evaluate("(image) => image.naturalWidth") > 100


def test_without_webgl_a_sentence_and_the_picture(page, chromium):
    browser = chromium("--disable-3d-apis")
    try:
        view = browser.new_page()
        view.goto(page.as_uri())
        view.wait_for_selector(".viewer[data-state=failed]", timeout=60_000)
        assert "no WebGL 2" in view.locator("[data-part=problem]").inner_text()
        assert view.locator("figure img").is_visible()
    finally:
        browser.close()


def test_the_error_is_shown_only_where_it_is_scored(tmp_path):
    mr = save(tmp_path / "mr.nii.gz", np.where(np.indices(SHAPE)[0] > 5, 500, 0).astype(np.float32), AFFINE)
    ct = np.full(SHAPE, -1000, np.float32)
    ct[8:30, 8:30, 4:16] = 40
    save(tmp_path / "ct.nii.gz", ct, AFFINE)
    save(tmp_path / "sct.nii.gz", ct + 10, AFFINE)
    error = shown(mr, tmp_path / "sct.nii.gz", tmp_path / "ct.nii.gz")[0]["synthetic CT - CT"][0]
    assert np.isnan(error[0, 0, 0]) and set(error[np.isfinite(error)]) == {10.0}
    assert np.isfinite(error[8:30, 8:30, 4:16]).mean() > 0.9
