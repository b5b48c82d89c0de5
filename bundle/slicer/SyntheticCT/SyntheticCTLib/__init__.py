"""The parts of the module that do not need 3D Slicer."""
