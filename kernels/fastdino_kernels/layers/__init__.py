"""Parts of the network: most are bound by memory, fp8_linear by products."""
