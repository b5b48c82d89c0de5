"""``wldm export-dicom``: from a synthetic CT and its record to a series and a structure set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import files_in, ramp, save, stub
from test_ct_series import series
from test_dicom import moved, write

from bundle.clinical.export_dicom import export_dicom
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError

MR = np.random.default_rng(5).integers(200, 1200, (8, 30, 24))
MR[:, :4] = MR[:, -4:] = MR[:, :, :4] = MR[:, :, -4:] = 0


@pytest.fixture
def made(tmp_path, infer) -> Path:
    """A folder with the MR series ``mr`` and its synthetic CT, as NIfTI and as a series."""
    series(tmp_path / "mr", stack=MR)
    infer(tmp_path / "mr", tmp_path / "out", output_format="nifti", **stub())
    infer(tmp_path / "mr", tmp_path / "dicom", **stub())
    return tmp_path


def refusal(*args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        export_dicom(*map(str, args), **{name: str(value) for name, value in kwargs.items()})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_from_nifti_and_in_the_pipeline_the_series_is_the_same(made, capsys):
    export_dicom(str(made / "out/mr_sct.nii.gz"), structures="external,bone")
    assert "mr_sct (8 slices)" in capsys.readouterr().out
    written, direct = (sorted((made / name / "mr_sct").iterdir()) for name in ("out", "dicom"))
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in direct]
    structures = pydicom.dcmread(made / "out/mr_sct_structures.dcm")
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == ["EXTERNAL", "BONE"]


def test_a_structure_set_can_be_added_to_a_series(made):
    before = files_in(made / "dicom")
    export_dicom(str(made / "dicom/mr_sct"))
    assert set(files_in(made / "dicom")) - set(before) == {"mr_sct_structures.dcm"}
    (frame,) = pydicom.dcmread(made / "dicom/mr_sct_structures.dcm").ReferencedFrameOfReferenceSequence
    uid = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0].SeriesInstanceUID
    assert uid == pydicom.dcmread(made / "dicom/mr_sct/ct_0001.dcm").SeriesInstanceUID


def test_a_nifti_mr_leads_to_a_study_of_its_own(tmp_path, infer):
    save(tmp_path / "a.nii.gz", ramp((14, 12, 10), np.diag([2.0, 2, 2, 1])))
    infer(tmp_path / "a.nii.gz", tmp_path / "out", **stub())
    export_dicom(str(tmp_path / "out/a_sct.nii.gz"), output_dir=str(tmp_path / "series"), structures="none")
    assert len(list((tmp_path / "series").iterdir())) == 10 and not list(tmp_path.glob("*.dcm"))
    assert pydicom.dcmread(tmp_path / "series/ct_0001.dcm").PatientID == "a"


def test_a_missing_or_foreign_record_is_refused(made):
    sct, record = made / "out/mr_sct.nii.gz", made / "out/mr_sct.json"
    content = json.loads(record.read_text())
    record.unlink()
    assert "mr_sct.json" in refusal(sct)
    record.write_text("{}")
    assert "is not the record" in refusal(sct)
    record.write_text(json.dumps({**content, "output_sha256": "0"}))
    assert "was changed" in refusal(sct)
    assert "no such file" in refusal(made / "out/b_sct.nii.gz")
    assert [path for path in files_in(made / "out") if path.endswith(".dcm")] == []


def test_another_series_is_refused(made):
    sct = made / "out/mr_sct.nii.gz"
    other = write(made / "other", moved(lambda k: [3, 0, 0]), stack=MR)
    assert "does not lie on this series" in refusal(sct, series=other)
    assert "no DICOM series" in refusal(sct, series=made / "nowhere")
    uneven = write(made / "uneven", moved(lambda k: [0, 0, 1.5 * (k == 4)]), stack=MR)
    assert "unevenly spaced" in refusal(sct, series=uneven)
    assert "no structure 'HEART'" in refusal(sct, structures="heart")


def test_an_mr_that_was_moved_can_be_given_and_one_that_changed_is_refused(made):
    sct = made / "out/mr_sct.nii.gz"
    (made / "mr").rename(made / "moved")
    assert "give it by --series" in refusal(sct)
    export_dicom(str(sct), series=str(made / "moved"))
    assert np.array_equal(*(np.asarray(read_volume(made / name)) for name in ("out/mr_sct", "dicom/mr_sct")))
    series(made / "mr", stack=MR + 1)
    assert "is not the MR any more" in refusal(sct)
