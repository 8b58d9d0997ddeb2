"""Where images come from: an index becomes an RGB image and a label."""
