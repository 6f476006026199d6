"""One tensor: from its float weight to what ships, and back."""
