"""``python -m bundle report OUT``: synthetic CTs and their scores in one HTML file."""
