"""Measures kernels, the training step and the data pipeline; figures go to bench/results/ with their provenance."""
