"""``compare``: every system of the paper, trained equally long and scored by the same code."""
