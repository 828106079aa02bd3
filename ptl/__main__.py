"""`python -m ptl` is the `ptl` command."""

from ptl.cli.app import main

main()
