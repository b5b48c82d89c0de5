"""The bundle as a MONAI Label app (docs/label.md)."""
