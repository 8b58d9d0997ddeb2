"""Whether a training fits, before it is started."""
