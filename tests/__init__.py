"""Judges. The same folder names as the code."""
