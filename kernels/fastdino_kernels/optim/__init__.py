"""Passes over the flat fp32 tensors of an optimizer's shard."""
