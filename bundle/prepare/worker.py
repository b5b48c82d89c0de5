"""Imported once by the server that patients' processes are forked from: ITK loads its parts on first use, which takes
seconds and would otherwise be paid for each patient."""

from __future__ import annotations

import itk

import bundle.prepare.command  # noqa: F401

PARTS = (
    itk.ElastixRegistrationMethod,
    itk.TransformixFilter,
    itk.ParameterObject,
    itk.N4BiasFieldCorrectionImageFilter,
)
