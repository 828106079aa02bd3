"""The wheel also has the pipeline, as plain folders in ptl/shipped (ptl/cli/arguments.py): setup.cfg cannot say so."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXAMPLES = ("tiny_reasoner", "smollm2", "math_suite", "qwen-coder", "from_gguf.py")
SHIPPED = ("components", "pipelines", *(f"examples/{name}" for name in EXAMPLES))


class BuildWithPipeline(build_py):
    """Copy them next to the package; an editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            target = Path(self.build_lib, "ptl", "shipped", name)
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build in build/
            if Path(name).is_file():
                shutil.copy(name, target)
            else:
                shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithPipeline})
