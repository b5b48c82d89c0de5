"""The tools around the bundle: ``python -m bundle COMMAND``."""
