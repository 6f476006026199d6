"""compress: recipes in, smaller language models out."""

from compress.runtime.hook import install as _install

__version__ = "0.1.0"

_install()
