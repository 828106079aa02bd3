"""`python -m ptl` is the `ptl` command."""

from ptl.cli import main

main()
