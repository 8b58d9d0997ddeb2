"""Logits become a loss."""
