"""``python -m modelfs`` is the command ``modelfs``."""

from modelfs.cli import main

main()
