"""Command line tools of the bundle: ``python -m bundle COMMAND``."""
