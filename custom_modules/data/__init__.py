"""Volumes in and out, bodies, Hounsfield units, transforms and training pairs."""
