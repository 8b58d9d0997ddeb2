"""Losses over prototype logits and features, and the targets that they take."""
