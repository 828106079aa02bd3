"""The wheel also has the pipeline, as plain folders in ptl/shipped (ptl/cli/arguments.py): setup.cfg cannot say so."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("components", "pipelines", "examples")


class BuildWithPipeline(build_py):
    """Copy the folders next to the package; an editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED:
            target = Path(self.build_lib, "ptl", "shipped", folder)
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build in build/
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", "ci"))


setup(cmdclass={"build_py": BuildWithPipeline})
