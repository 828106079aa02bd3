"""The command line in a fork of a process that has imported what its commands need.

Exit code, output and environment are those of `python -m ptl`; what a start costs is paid once a worker of the suite.
"""

import os
import subprocess
import sys
import tempfile
from multiprocessing import get_context, reduction
from unittest import mock

from checkout import ROOT

CLEAN = dict(os.environ)  # before any test changes it: modules read settings while they are imported
HEAVY = ["transformers.models.llama.modeling_llama", "transformers.generation", "accelerate", "scipy.optimize"]
HEAVY += ["mlflow.transformers", "kfp.compiler", "kfp.kubernetes", "boto3", "lm_eval.tasks", "ptl.cli.app"]

forks = get_context("forkserver")
forks.set_forkserver_preload(HEAVY)


def ptl(*arguments, cwd=ROOT, env=None, timeout=300):
    """Run `ptl`, as `subprocess.run` does with captured text; `env` takes the place of this process's environment."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = [reduction.DupFd(file.fileno()) for file in (out, err)]
        environment = dict(os.environ if env is None else env)
        process = forks.Process(target=_main, args=(tuple(map(str, arguments)), str(cwd), environment, *files))
        with mock.patch.dict(os.environ, CLEAN, clear=True):  # of the server, which the first command starts
            process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(["ptl", *arguments], process.exitcode, out.read(), err.read())


def _main(arguments, cwd, environment, *files):
    for number, file in enumerate(files, start=1):
        os.dup2(file.detach(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ptl", *arguments]
    from ptl.cli.app import main

    sys.exit(main())
