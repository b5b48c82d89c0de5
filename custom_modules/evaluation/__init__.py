"""Scores of synthetic CTs: metrics, uncertainty, organs, a whole split."""
