"""Compile reports: what Triton's compiler makes of every kernel, for every target, without a GPU."""
