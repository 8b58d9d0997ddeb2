"""Formats beside Pillow's, and what becomes of values that are no bytes."""
