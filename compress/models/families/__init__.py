"""Architecture families: one table per file."""
