"""What a person runs who has a GPU for some minutes: ``python -m bench.visit``."""
