"""`python -m tabletune`."""

from tabletune.cli.main import main

main()
