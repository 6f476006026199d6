"""Streaming: activations and finished units on disk."""
