"""Classifiers that learn with the backbone, or on top of it."""
