"""compress: recipes in, smaller language models out."""

__version__ = "0.1.0"
