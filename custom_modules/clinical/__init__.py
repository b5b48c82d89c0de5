"""What clinics read next: DICOM CT and structure sets, attenuation maps, densities, and the error of a PET."""
