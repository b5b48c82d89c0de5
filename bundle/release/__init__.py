"""Releases of the bundle: weights, exports, the verified archive."""
