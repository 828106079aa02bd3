"""The command line: one module for each group of commands; the one room that may import pipelines/."""

from ptl.cli import arguments

arguments.make_importable()
