"""``fastdino doctor``: whether a training can begin here, asked before one is started."""
