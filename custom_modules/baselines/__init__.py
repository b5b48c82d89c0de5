"""What the compared systems add to the networks of MONAI."""
