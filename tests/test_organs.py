"""Labels of organs: names from the header as TotalSegmentator writes them, HU by hand, tissues of simulated MRs."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from bundle.clinical.organs import organs
from bundle.simulate import simulate
from custom_modules.data.organs import TISSUE_WORDS, class_names, organ_tissues
from custom_modules.data.pairs import check_pairs_or_stop, load_pairs
from custom_modules.data.regions import MARROW, tissue_regions
from custom_modules.data.simulation import SimulateMR
from custom_modules.errors import InputError
from custom_modules.evaluation.clinical import clinical_figures
from custom_modules.evaluation.organs import organ_hu, usual_hu

AFFINE = np.diag([2.0, 2, 2, 1])
XML = (
    '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension><VolumeInformation Index="0"><LabelTable>\n'
    '<Label Key="5" Red="0.0"><![CDATA[liver]]></Label>\n<Label Key="13" Red="1.0"><![CDATA[lung_left]]></Label>'
    '<Label Key="20" Red="1.0"><![CDATA[aorta]]></Label></LabelTable></VolumeInformation></CaretExtension>'
)


def volume() -> tuple[np.ndarray, np.ndarray]:
    """A body of 0 HU in air with a liver of 50 HU whose rim is fat, a lung that is as dense as soft tissue, an aorta of
    one voxel."""
    hu, labels = np.full((24, 24, 24), -1000.0, np.float32), np.zeros((24, 24, 24), np.uint8)
    hu[2:22, 2:22, 2:22] = 0
    hu[3:10, 3:10, 3:10], hu[4:9, 4:9, 4:9] = -100, 50
    labels[3:10, 3:10, 3:10] = 5
    labels[12:18, 12:18, 12:18] = 13
    labels[20, 20, 20], hu[20, 20, 20] = 20, 33
    return hu, labels


def save(path, data, xml=None):
    path.parent.mkdir(exist_ok=True)
    image = nib.Nifti1Image(data, AFFINE)
    if xml:
        image.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml.encode()))
    nib.save(image, path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    hu, labels = volume()
    return save(tmp_path / "a_sct.nii.gz", hu), save(tmp_path / "labels.nii.gz", labels, XML)


def test_the_median_of_an_organ_leaves_out_its_rim_and_is_judged_by_the_usual_range():
    rows = {row["organ"]: row for row in organ_hu(*volume(), {5: "liver", 13: "lung_left", 20: "aorta"})}
    assert (rows["liver"]["median"], rows["liver"]["within"], rows["liver"]["voxels"]) == (50, True, 343)
    assert (rows["lung_left"]["median"], rows["lung_left"]["within"]) == (0, False)
    assert (rows["aorta"]["median"], rows["aorta"]["usual"], rows["aorta"]["within"]) == (33, None, None)


@pytest.mark.parametrize(
    "name, usual",
    [("kidney_right", (20, 45)), ("lung_upper_lobe_left", (-900, -600)), ("gluteus_maximus_left", (35, 70)),
     ("vertebrae_L3", (100, 300)), ("subcutaneous_fat", (-120, -70)), ("aorta", None), ("colon", None)],
)  # fmt: skip
def test_classes_are_known_by_the_words_in_their_names(name, usual):
    assert usual_hu(name) == usual


def test_names_are_read_from_the_header(files, tmp_path):
    assert class_names(files[1]) == {5: "liver", 13: "lung_left", 20: "aorta"}
    assert class_names(files[0]) == {}
    assert class_names(save(tmp_path / "odd.nii.gz", volume()[1], "<?xml broken")) == {}


def test_the_command_prints_and_writes_what_evaluate_picks_up(files, capsys):
    organs(*files)
    printed = capsys.readouterr().out
    assert "outside" in printed and "usual          1 of 2 organs" in printed
    record = json.loads(Path(files[0].replace("a_sct.nii.gz", "a_sct_organs.json")).read_text())
    assert [row["organ"] for row in record["organs"]] == ["liver", "lung_left", "aorta"]
    assert clinical_figures(files[0]) == {"organs_usual": 0.5}


def test_names_may_come_from_a_file(files, tmp_path):
    bare, names = save(tmp_path / "bare.nii.gz", volume()[1]), tmp_path / "names.json"
    names.write_text('{"5": "spleen", "13": "colon", "20": "aorta"}')
    organs(files[0], bare, str(names), str(tmp_path / "o.json"))
    assert json.loads((tmp_path / "o.json").read_text())["usual_share"] == 1.0


@pytest.mark.parametrize(
    "labels, names, message",
    [(volume()[1], None, "no name for class 5, 13, 20"), (np.zeros((24, 24, 24), np.uint8), None, "every voxel is 0"),
     (volume()[1] * 0.3, None, "not a label volume"),
     (volume()[1][:20], None, "grid"), (volume()[1], "[1, 2]", "not a JSON file of names"),
     (volume()[1], "oops", "not a JSON file of names")],
)  # fmt: skip
def test_labels_that_cannot_be_used_are_refused_and_nothing_is_written(files, tmp_path, labels, names, message):
    bad = save(tmp_path / "bad.nii.gz", labels)
    if names is not None:
        (tmp_path / "names.json").write_text(names)
        names = str(tmp_path / "names.json")
    with pytest.raises(InputError, match=message):
        organs(files[0], bad, names)
    assert not (tmp_path / "a_sct_organs.json").exists()


def test_a_volume_that_is_not_in_hu_is_refused(files, tmp_path):
    mr = save(tmp_path / "mr.nii.gz", np.abs(volume()[0]))
    with pytest.raises(InputError, match="Hounsfield|HU"):
        organs(mr, files[1])


def test_the_tissue_of_organs_follows_the_names_of_their_classes_onto_the_grid_of_the_ct(files):
    labels = volume()[1]
    flipped = AFFINE @ np.array([[-1, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    ct = MetaTensor(torch.zeros(1, 24, 24, 24), affine=flipped)
    tissues = organ_tissues(files[1], ct)[::-1]
    place = {name: number for number, name in enumerate(TISSUE_WORDS, start=1)}
    assert set(np.unique(tissues[labels == 5])) == {place["liver"]}
    assert set(np.unique(tissues[labels == 20])) == {place["blood"]}
    assert not tissues[labels == 13].any() and not tissues[labels == 0].any()  # the lung is seen in the HU


def test_labelled_organs_are_of_their_tissue_in_every_simulated_mr(files):
    hu, labels = volume()
    hu[labels == 5] = 50
    sequence = {"sequence": "spin_echo", "repetition_time": (500, 500), "echo_time": (15, 15)}
    off = {"dephasing": (0, 0), "shading": (1, 1), "noise": (0, 0), "relaxation": 0.0, "thick_slices": 0.0}
    draw = SimulateMR({"one": sequence}, organs=(1, 1), **off)  # whatever has no label is of any organ
    organs = organ_tissues(files[1], MetaTensor(torch.from_numpy(labels)[None].float(), affine=AFFINE))

    def signal(density: float, t1: float, t2: float) -> float:
        return float(density * (1 - np.exp(-500 / t1)) * np.exp(-15 / t2))

    liver, blood = [((586, 46), (809, 34)), ((1441, 290), (1932, 275))]
    expected = {round(signal(0.71, *liver[n]) / signal(0.83, *blood[n]), 2) for n in range(2)}
    organs[12:18, 12:18, 12:18] = list(TISSUE_WORDS).index("blood") + 1  # of a size that its middle is not blurred
    hu[12:18, 12:18, 12:18] = 50
    regions = tissue_regions(hu, hu > -500, (2, 2, 2), organs)
    found = set()
    for seed in range(8):
        draw.set_random_state(seed)
        mr = draw(hu, regions, (2, 2, 2))
        found.add(round(float(mr[6, 6, 6] / mr[15, 15, 15]), 2))
    assert found == expected


def test_labels_say_what_is_bone():
    ct, organs = np.full((40, 40, 40), 50, np.float32), np.zeros((40, 40, 40), np.uint8)
    ct[4:16, 4:36, 4:36], ct[22:36, 4:36, 4:36] = 100, 700  # vertebra of low density; aorta with contrast medium
    organs[4:16, 4:36, 4:36], organs[22:36, 4:36, 4:36] = (1 + list(TISSUE_WORDS).index(n) for n in ("marrow", "blood"))
    alone, labelled = (tissue_regions(ct, ct > -500, (2, 2, 2), labels) == MARROW for labels in (None, organs))
    assert not alone[6:14, 6:34, 6:34].any() and alone[24:34, 6:34, 6:34].all()
    assert labelled[6:14, 6:34, 6:34].all() and not labelled[24:34, 6:34, 6:34].any()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda labels: labels[:20], "grid"),
        (lambda labels: np.where(labels == 5, 35, labels).astype(np.uint8), "no name for class 35"),
    ],
)
def test_organs_that_do_not_belong_to_the_ct_are_refused_before_training(tmp_path, change, message):
    hu, labels = volume()
    save(tmp_path / "ct.nii.gz", hu + np.random.default_rng(0).normal(0, 5, hu.shape).astype(np.float32))
    save(tmp_path / "organs.nii.gz", change(labels), XML)
    entries = [{"label": "ct.nii.gz", "organs": "organs.nii.gz"}]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": entries}))
    pairs = load_pairs(tmp_path / "datalist.json", tmp_path, ["training"], unpaired=True)
    with pytest.raises(SystemExit, match=rf"organs\.nii\.gz.*{message}|{message}.*organs\.nii\.gz"):
        check_pairs_or_stop(pairs, 1)


def test_a_ct_with_organs_is_simulated(files, tmp_path):
    hu = volume()[0]
    save(tmp_path / "ct.nii.gz", hu)
    simulate(str(tmp_path / "ct.nii.gz"), str(tmp_path / "out"), "t2", organs=files[1], quiet=True)
    simulate(str(tmp_path / "ct.nii.gz"), str(tmp_path / "plain"), "t2", quiet=True)
    mrs = [nib.load(next((tmp_path / name).rglob("mr.nii.gz"))).get_fdata() for name in ("out", "plain")]
    assert mrs[0].shape == mrs[1].shape and not np.array_equal(*mrs)
    save(tmp_path / "two/a.nii.gz", hu)
    save(tmp_path / "two/b.nii.gz", hu)
    with pytest.raises(InputError, match="--organs is of one CT"):
        simulate(str(tmp_path / "two"), str(tmp_path / "out"), organs=files[1], quiet=True)
