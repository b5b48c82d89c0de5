"""Handing the bundle out: weights, exports, the verified archive."""
