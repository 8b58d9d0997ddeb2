"""What watches a run: which rank is slow, what its GPUs do, and who else is told."""
