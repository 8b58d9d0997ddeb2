"""Folders of known layouts become images with what is true of them."""
