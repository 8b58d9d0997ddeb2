"""Parts of the network that are bound by memory."""
