"""``compare``: every system of the paper, trained for the same time and scored by the same code."""
