"""Pictures of what the tokens of patches are alike in."""
