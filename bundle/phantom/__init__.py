"""``phantom``: made-up patients of known anatomy."""
