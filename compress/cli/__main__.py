"""python -m compress.cli"""

from compress.cli import main

main()
