"""What the tokens of patches know of a picture."""
