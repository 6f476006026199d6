"""Engines: who runs a model, and gives its logits."""
