"""Decoded images become views."""
