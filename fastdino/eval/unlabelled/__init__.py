"""What features are worth where no image has a label."""
