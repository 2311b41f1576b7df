"""`python -m helios.cli` is `helios`."""

from helios.cli import main

main()
