"""What class each pixel is of, told from the tokens of patches."""
