"""``phantom``: synthetic patients with known anatomy."""
