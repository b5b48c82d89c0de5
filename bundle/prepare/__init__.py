"""``prepare``: from clinical files to registered training pairs."""
