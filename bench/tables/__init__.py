"""Tables of the docs that are computed, from no file of results."""
