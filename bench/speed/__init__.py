"""``pytest bench``: every kernel, attention, the step and data as pytest-benchmark's cases, timed by itself."""
