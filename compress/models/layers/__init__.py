"""Sub-layers: what each kind of residual branch of a block is made of, declared once. No torch.

A file here declares one kind; what it computes stands in the file of the same name in `compress.models.forward`.
"""
