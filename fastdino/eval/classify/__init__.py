"""Which class an image is of, told from frozen features."""
