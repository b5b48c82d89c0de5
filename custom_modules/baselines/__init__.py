"""Additions to MONAI's networks for the systems that 3D-WLDM is compared with."""
