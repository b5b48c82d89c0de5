"""``python -m bundle simulate``: MRs simulated from CTs, as pairs that `evaluate` scores and people can look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd
from tqdm import tqdm

from bundle.workflow import ROOT
from custom_modules.data.grid import ToSpacingd
from custom_modules.data.hu import check_hu
from custom_modules.data.inputs import find_volumes
from custom_modules.data.regions import CTBodyd, CTRegionsd
from custom_modules.data.sampler import seed_of
from custom_modules.data.simulation import SimulateMR
from custom_modules.data.volumes import ReadVolumed, sibling_path, write_volume
from custom_modules.errors import InputError
from custom_modules.files import writable_or_stop, write_json

CONFIG = ROOT / "configs" / "whole_body.yaml"


def simulate(
    ct: str,
    output_dir: str = "simulated",
    contrasts: str | Sequence[str] = "all",
    organs: str | None = None,
    spacing: float = 2.0,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Simulate an MR of each contrast for a CT, or for each CT in a folder.

    Writes ``<name>/<contrast>/mr.nii.gz``, the CT on the same grid without its couch, and ``datalist.json`` with all of
    them as the test split, for ``wldm evaluate --dataset_dir OUTPUT_DIR``.

    Args:
        contrasts: names from configs/whole_body.yaml joined by commas, or ``all``.
        organs: label volume of the CT's organs, with names in its header as TotalSegmentator writes them; for one CT.
        spacing: mm, of the grid.
        seed: of everything random.
        quiet: print nothing.

    Raises:
        InputError: for a volume that is no CT in HU, or an unknown contrast.
    """
    config = ConfigParser.load_config_file(str(CONFIG))
    simulator = SimulateMR(config["contrasts"])
    names = list(simulator.contrasts) if contrasts == "all" else _split(contrasts)
    for name in names:
        if name not in simulator.contrasts:
            raise InputError(f"no contrast '{name}'; there are {', '.join(simulator.contrasts)}")
    folder = Path(writable_or_stop(output_dir))
    read = Compose(
        [
            Orientationd("label", axcodes="RAS", labels=None), ToSpacingd("label", [spacing] * 3),
            CTBodyd("label"), CTRegionsd("label"),
        ]
    )  # fmt: skip
    entries = []
    volumes = find_volumes(str(ct))
    if organs and len(volumes) > 1:
        raise InputError(f"--organs is of one CT, {ct} holds {len(volumes)}")
    for number, volume in enumerate(tqdm(volumes, desc="simulating", unit="CT", disable=quiet)):
        source = ReadVolumed("label")({"label": volume["image"]})
        check_hu(np.asarray(source["label"][0]), str(volume["image"]))
        data = read({**source, "organs": organs} if organs else source)
        values, regions = np.asarray(data["label"][0]), np.asarray(data["regions"][0])
        patient = str(sibling_path(volume["output"], "", "")).removesuffix("_sct")
        for contrast in names:
            simulator.set_random_state(seed_of(seed, number, list(simulator.contrasts).index(contrast)))
            mr = simulator(values, regions, [spacing] * 3, contrast)
            for name, array in (("mr", mr), ("ct", values)):
                item = MetaTensor(torch.from_numpy(array.round().astype(np.int16))[None], affine=data["label"].affine)
                write_volume(item, folder / patient / contrast / f"{name}.nii.gz")
            files = {key: f"{patient}/{contrast}/{name}.nii.gz" for key, name in (("image", "mr"), ("label", "ct"))}
            entries.append({**files, "patient": f"{patient}_{contrast}"})
    write_json({"simulated": True, "test": entries}, folder / "datalist.json")
    if not quiet:
        print(f"{len(entries)} simulated MRs of {len(volumes)} CTs; wldm evaluate --dataset_dir {folder}")


def _split(names: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
