"""Where images come from: an index becomes an image and a label."""
