"""Which images show the same thing."""
