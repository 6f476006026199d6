"""Recovery: what quantized models keep in float, tuned."""
