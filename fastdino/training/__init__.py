"""The run: its loop, its folder, what it reports and leaves behind."""
