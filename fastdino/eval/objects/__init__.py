"""Objects that nobody labelled: found in images, and followed through videos."""
