"""What ``wldm synthesize`` makes of a synthetic CT on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bundle.clinical.dose import dose
from bundle.clinical.export_dicom import export_dicom, structure_names
from bundle.clinical.maps import attenuation, density
from bundle.clinical.pet import pet
from custom_modules.clinical.attenuation import attenuation_of
from custom_modules.clinical.density import QUANTITIES
from custom_modules.clinical.structures import STRUCTURES
from custom_modules.errors import InputError


@dataclass(frozen=True)
class Further:
    """The commands to run on each synthetic CT, None for those that are not wanted.

    Attributes:
        structures: names of structures, for :func:`export_dicom`.
        attenuation: tube voltage in kVp.
        density: electron, mass or both.
        pet, dose: the CT to compare with.
    """

    structures: str | None = None
    attenuation: int | None = None
    density: str | None = None
    pet: str | None = None
    dose: str | None = None

    def check(self, volumes: int) -> None:
        """Raise InputError for what cannot be done, before anything is synthesised."""
        unknown = set(structure_names(self.structures or "")) - set(STRUCTURES)
        if unknown:
            raise InputError(f"--structures: no structure '{unknown.pop()}'; there are {', '.join(STRUCTURES)}")
        if self.attenuation is not None:
            attenuation_of(np.zeros(1), self.attenuation)
        if self.density not in (None, "both", *QUANTITIES):
            raise InputError(f"--density {self.density}: give electron, mass or both")
        for name, ct in (("pet", self.pet), ("dose", self.dose)):
            if ct is not None and volumes > 1:
                raise InputError(f"--{name}: takes the CT of one MR, and there are {volumes}; run wldm {name} for each")
            if ct is not None and not Path(ct).exists():
                raise InputError(f"--{name} {ct}: no such CT")

    def run(self, sct: str | Path, mr: str) -> None:
        """Run the commands that are wanted."""
        if structure_names(self.structures or ""):
            export_dicom(str(sct), structures=str(self.structures))
        if self.attenuation is not None:
            attenuation(str(sct), self.attenuation)
        if self.density is not None:
            density(str(sct), self.density)
        if self.pet is not None:
            pet(self.pet, str(sct), mr=mr)
        if self.dose is not None:
            dose(self.dose, str(sct), mr=mr)
