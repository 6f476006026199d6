"""compress: recipes in, smaller language models out."""

from compress._register import install as _install

__version__ = "0.1.0"

_install()
