"""Which class an image is of, told from frozen features or by a network that is tuned."""
