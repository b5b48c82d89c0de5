"""HU of organs: medians by hand, names from the header as TotalSegmentator writes them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bundle.clinical.organs import organs
from custom_modules.errors import InputError
from custom_modules.evaluation.clinical import clinical_figures
from custom_modules.evaluation.organs import class_names, organ_hu, usual_hu

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
