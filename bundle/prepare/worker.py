"""Imported once by the server from which the processes of patients are forked: ITK loads its parts on first use, which
would otherwise take seconds for each patient."""

from __future__ import annotations

import itk

import bundle.prepare.command  # noqa: F401

PARTS = (
    itk.ElastixRegistrationMethod,
    itk.TransformixFilter,
    itk.ParameterObject,
)
