"""Export: artifacts written, read back, scored, gated, renamed."""
