"""Points become a loss."""
