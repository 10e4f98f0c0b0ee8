"""`python -m tabletune`."""

from tabletune.cli import main

main()
