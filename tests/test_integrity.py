"""Damaged files (truncated, with flipped bits, or with headers that promise more) are refused, or read the same."""

from __future__ import annotations

import gzip
import resource
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from conftest import save
from test_dicom import enhanced, write
from test_volumes import OBLIQUE, VALUES, save_itk

from custom_modules.data.volumes import read_grid, read_volume
from custom_modules.errors import InputError

COMPRESSED = ("a.nii.gz", "a.mha", "a.nrrd")
PLAIN = ("plain.nii", "plain.mha", "plain.nrrd")
HEADERS = (*COMPRESSED, *PLAIN, "dicom", "enhanced.dcm")
MEMORY = 2**28  # bytes beyond what the process holds, for files of a few kilobytes


def make(folder: Path, name: str) -> Path:
    """VALUES in the format of ``name``, compressed unless it says plain."""
    path = folder / name
    if name == "dicom":
        return write(path)
    if name == "enhanced.dcm":
        return enhanced(path)
    if ".nii" in name:
        return save(path, VALUES, OBLIQUE)
    save_itk(path)
    if name in COMPRESSED:
        itk.imwrite(itk.imread(str(path)), str(path), compression=True)
    return path


def header_end(path: Path) -> int:
    """Bytes before the voxels."""
    content = path.read_bytes()
    marks = {".mha": b"ElementDataFile = LOCAL\n", ".nrrd": b"\n\n", ".nii": None, ".dcm": b"\xe0\x7f\x10\x00"}
    if path.suffix == ".gz":
        return 40
    mark = marks[path.suffix]
    return 352 if mark is None else content.index(mark) + len(mark)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def outcome(path: Path) -> np.ndarray | None:
    """What is read; None where it is refused in one line that names it. Anything else is a failure."""
    grid = read_grid(path)
    try:
        volume = np.asarray(read_volume(path)[0])
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return None
    assert grid is None or volume.shape == grid[0]
    return volume


def flipped(path: Path, count: int, first: int, last: int, seed: int = 0) -> list[np.ndarray | None]:
    """The outcomes of ``count`` single-bit flips between two bytes of a file, or of the files of a folder in turn."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    rng, found = np.random.default_rng(seed), []
    for n in range(count):
        victim = files[n % len(files)]
        before = victim.read_bytes()
        flip(victim, int(rng.integers(first * 8, min(last, len(before)) * 8)))
        found.append(outcome(path))
        victim.write_bytes(before)
    return found


def check_compressed(folder: Path, name: str, count: int) -> Counter:
    path = make(folder, name)
    expected = outcome(path)
    np.testing.assert_array_equal(expected, VALUES)
    found = flipped(path, count, 0, path.stat().st_size)
    assert all(volume is None or np.array_equal(volume, expected) for volume in found)
    return Counter("refused" if volume is None else "the same voxels" for volume in found)


def check_headers(folder: Path, name: str, count: int) -> Counter:
    path = make(folder, name)
    expected = outcome(path)
    first = 132 if name in ("dicom", "enhanced.dcm") else 0
    last = header_end(sorted(path.iterdir())[0] if path.is_dir() else path)
    found = flipped(path, count, first, last, seed=1)
    same = [volume is not None and np.array_equal(volume, expected) for volume in found]
    return Counter(
        "refused" if volume is None else "the same voxels" if equal else "other voxels"
        for volume, equal in zip(found, same)
    )


@pytest.fixture
def limited_memory():
    """An allocation of more than a small volume needs fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_flipped_bit_in_a_compressed_file_is_refused_or_changes_nothing(tmp_path, name):
    counts = check_compressed(tmp_path, name, 200)
    assert counts["refused"] > 100


@pytest.mark.parametrize("name", HEADERS)
def test_a_flipped_bit_in_a_header_is_refused_or_read(tmp_path, name, limited_memory):
    assert sum(check_headers(tmp_path, name, 40).values()) == 40


@pytest.mark.slow
def test_a_thousand_flips_of_every_kind(tmp_path, limited_memory, capsys):
    results, started = {}, time.perf_counter()
    for name in COMPRESSED:
        results[f"{name}, anywhere"] = check_compressed(tmp_path / "whole", name, 1000)
    for name in HEADERS:
        results[f"{name}, header"] = check_headers(tmp_path / "headers", name, 1000)
    with capsys.disabled():
        for name, counts in results.items():
            print(f"{name:24}{dict(counts)}")
        print(f"{time.perf_counter() - started:.0f} s")


@pytest.mark.parametrize("name", (*COMPRESSED, *PLAIN))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_a_file_that_is_cut_off_is_refused(tmp_path, name, share):
    path = make(tmp_path, name)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert outcome(path) is None


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_wrong_checksum_alone_is_refused(tmp_path, name):
    path = make(tmp_path, name)
    flip(path, (path.stat().st_size - (6 if name != "a.mha" else 2)) * 8)
    assert outcome(path) is None


def test_bytes_behind_the_voxels_are_no_slice(tmp_path):
    path = make(tmp_path, "plain.nii")
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    np.testing.assert_array_equal(outcome(path), VALUES)
    path.write_bytes(path.read_bytes() + b"\0" * 400)
    with pytest.raises(InputError, match="its header says"):
        read_volume(path)


HUGE = (30000, 30000, 30000)


def huge(path: Path) -> Path:
    """A file of a kilobyte whose header asks for 50 TiB."""
    text = " ".join(map(str, HUGE))
    if ".nii" in path.name:
        header = nib.Nifti1Header()
        header.set_data_shape(HUGE)
        header.set_data_dtype(np.int16)
        header.set_sform(np.diag([2, 2, 2, 1]), 1)
        header["magic"], header["vox_offset"] = b"n+1", 352
        content = header.binaryblock + bytes(1000)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    elif path.suffix == ".nrrd":
        encoding = "gzip" if path.name in COMPRESSED else "raw"
        fields = f"NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: {text}\n"
        fields += "space directions: (2,0,0) (0,2,0) (0,0,2)\n"
        data = gzip.compress(bytes(1000)) if encoding == "gzip" else bytes(1000)
        path.write_bytes(f"{fields}endian: little\nencoding: {encoding}\nspace origin: (0,0,0)\n\n".encode() + data)
    else:
        packed = path.name in COMPRESSED
        fields = f"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = {packed}\nDimSize = {text}\n"
        data = zlib.compress(bytes(1000)) if packed else bytes(1000)
        fields += f"CompressedDataSize = {len(data)}\n" * packed
        path.write_bytes(
            f"{fields}ElementSpacing = 2 2 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n".encode() + data
        )
    return path


@pytest.mark.parametrize("name", (*COMPRESSED, *PLAIN))
def test_a_header_that_asks_for_terabytes_is_refused_before_they_are_reserved(tmp_path, name, limited_memory):
    path = huge(tmp_path / name)
    with pytest.raises(InputError, match="of 54000000000000 bytes"):
        read_volume(path)


def test_a_compressed_file_that_would_fill_the_memory_is_read_no_further_than_its_header_tells(
    tmp_path, limited_memory
):
    header = nib.load(save(tmp_path / "a.nii", VALUES)).header
    with gzip.open(tmp_path / "bomb.nii.gz", "wb", compresslevel=1) as file:
        file.write(header.binaryblock)
        for _ in range(512):
            file.write(bytes(2**20))
    started = time.perf_counter()
    assert outcome(tmp_path / "bomb.nii.gz") is None and time.perf_counter() - started < 1


# headers


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1.0), ("unknown", 1.0), ("micron", 1e3), ("meter", 1e-3)])
def test_nifti_is_brought_to_millimetres_by_its_unit(tmp_path, unit, scale):
    affine = np.diag([scale, scale, scale, 1]) @ OBLIQUE
    image = nib.Nifti1Image(VALUES, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    read = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read.affine, OBLIQUE, atol=1e-3)
    np.testing.assert_allclose(read_grid(tmp_path / "a.nii.gz")[1], [1.5, 2.5, 3.0], atol=1e-4)


def test_micrometres_without_a_unit_are_refused_by_their_spacing(tmp_path):
    path = save(tmp_path / "a.nii.gz", VALUES, np.diag([3000.0, 3000, 5000, 1]))
    assert read_grid(path) is None  # so that nobody reckons the memory of it
    with pytest.raises(
        InputError, match="spacing 3000 x 3000 x 5000 mm is not usable; correct the header and its unit"
    ):
        read_volume(path)


def nrrd(path: Path, sizes: str, directions: str, kinds: str, more: str = "", data: bytes = b"") -> Path:
    fields = f"NRRD0005\ntype: short\ndimension: {len(sizes.split())}\nsizes: {sizes}\nendian: little\nkinds: {kinds}\n"
    fields += f"space: left-posterior-superior\nspace directions: {directions}\n"
    fields += f"space origin: (0,0,0)\n{more}encoding: raw\n\n"
    path.write_bytes(fields.encode() + (data or VALUES.astype("<i2").tobytes(order="F")))
    return path


@pytest.mark.parametrize(
    ("sizes", "directions", "kinds"),
    [
        ("9 8 7 1", "(3,0,0) (0,3,0) (0,0,5) none", "domain domain domain list"),
        ("1 9 8 7", "none (3,0,0) (0,3,0) (0,0,5)", "list domain domain domain"),
    ],
)
def test_an_axis_that_is_none_of_space_is_dropped_where_it_has_one_element(tmp_path, sizes, directions, kinds):
    read = read_volume(nrrd(tmp_path / "a.nrrd", sizes, directions, kinds))
    np.testing.assert_array_equal(np.asarray(read[0]), VALUES)
    np.testing.assert_allclose(read.affine, np.diag([-3, -3, 5, 1]), atol=1e-6)


REFUSED = {
    "an axis of two": (lambda p: nrrd(p, "9 8 7 2", "(3,0,0) (0,3,0) (0,0,5) none", "domain domain domain list",
                                      data=bytes(9 * 8 * 7 * 4)), "a.nrrd", "axis 4 of 4 is not spatial"),
    "voxels elsewhere": (lambda p: nrrd(p, "9 8 7", "(3,0,0) (0,3,0) (0,0,5)", "domain domain domain",
                                        "data file: ../x.raw\n"), "a.nrrd", "in another file"),
    "skipped bytes": (lambda p: nrrd(p, "9 8 7", "(3,0,0) (0,3,0) (0,0,5)", "domain domain domain",
                                     "byte skip: 10\n"), "a.nrrd", "skips"),
    "mha of voxels elsewhere": (lambda p: p.write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 9 8 7\nElementType = MET_SHORT\nElementDataFile = x.raw\n"
    ), "a.mha", "in another file"),
    "text mha": (lambda p: p.write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = False\nDimSize = 2 2 2\nElementType = MET_SHORT\n"
        "ElementDataFile = LOCAL\n1 2 3 4 5 6 7 8\n"
    ), "a.mha", "as text"),
    "shorts for floats": (lambda p: p.write_bytes(
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 9 8 7\nElementType = MET_FLOAT\n"
        b"ElementDataFile = LOCAL\n"
        + VALUES.tobytes()
    ), "a.mha", "1008 of 2016 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_headers_that_cannot_be_followed_are_refused_with_the_reason(tmp_path, case):
    write_it, name, reason = REFUSED[case]
    write_it(tmp_path / name)
    with pytest.raises(InputError, match=reason):
        read_volume(tmp_path / name)


def test_what_libraries_remark_on_headers_reaches_nobody(tmp_path, capfd):
    path = make(tmp_path, "plain.nii")
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 76, 3.0)  # qfac, which is 1 or -1
    struct.pack_into("<h", content, 252, 17)  # a form that is not known
    path.write_bytes(content)
    outcome(path)
    for name in ("dicom", "a.mha", "a.nrrd", "enhanced.dcm"):
        flipped(make(tmp_path, name), 20, 132, 1000)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
