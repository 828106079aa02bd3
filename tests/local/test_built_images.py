"""The images themselves, in an engine; without one all of this is skipped, loudly.

`.ci/docker.sh run .venv/bin/pytest -m docker` starts an engine where there is none and builds the images first.
"""

import json
import subprocess

import pytest
from packaging.utils import canonicalize_name

import ptl
from ptl.config import image_names
from ptl.steps import mounts

HARDENED = [
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp",
    "--network=none",
]
STEPS = {"prune": ["prune"], "recover": ["recover"], "evaluate": ["import-model", "evaluate"]}
pytestmark = [pytest.mark.docker, pytest.mark.nightly, pytest.mark.usefixtures("engine")]


def output(*command):
    answer = subprocess.run(["docker", *command], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def run(name, *command, flags=("--user=12345:0",)):
    return output("run", "--rm", *HARDENED, *flags, image_names.image(name), "python", *command)


LOOK_AROUND = """
import getpass, json, os
from importlib.metadata import distributions
import kfp.dsl.executor_main, mlflow, torch, ptl
print(json.dumps({
    "user": [os.getuid(), getpass.getuser()], "version": ptl.__version__, "in_site": "site-packages" in ptl.__file__,
    "writable": [f for f in (".", os.environ["HOME"], "/opt/ptl", "/tmp") if os.access(f, os.W_OK)],
    "files": sorted(os.listdir("examples/tiny_reasoner")), "names": sorted({d.name for d in distributions()}),
}))
"""


@pytest.mark.parametrize("name", image_names.IMAGES)
def test_an_image_runs_its_steps_unprivileged_on_a_read_only_root(name):
    for step in STEPS[name]:
        assert "Usage" in run(name, "-m", "ptl", step, "--help")
    seen = json.loads(run(name, "-c", LOOK_AROUND))
    assert (seen["user"], seen["version"], seen["in_site"]) == (
        [12345, "ptl"],
        ptl.__version__,
        True,
    )
    assert seen["writable"] == ["/tmp"]
    assert {"checkpoint", "tiny_reasoner.yaml", "train.jsonl.gz"} <= set(seen["files"])
    packages = {canonicalize_name(package) for package in seen["names"]}
    assert {"kfp", "mlflow-skinny"} <= packages and "mlflow" not in packages
    assert (("trl" in packages), ("lm-eval" in packages)) == (name == "recover", name == "evaluate")
    assert json.loads(run(name, "-c", LOOK_AROUND, flags=()))["user"][0] == 1000
    labels = json.loads(
        output("image", "inspect", image_names.image(name), "--format", "{{json .Config.Labels}}")
    )
    assert labels["org.opencontainers.image.version"] == ptl.__version__


# Folders of caches, by the variable that names each.
CACHES = (
    "HF_HOME",
    "XDG_CACHE_HOME",
    "MPLCONFIGDIR",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)
TRY_CACHES = f"""
import json, os, tempfile
from ptl.steps import mounts
warnings = mounts.load()  # as a step begins
refused = []
for folder in [*(os.environ[name] for name in {CACHES}), tempfile.gettempdir()]:
    try:
        os.makedirs(folder, exist_ok=True)
        open(os.path.join(folder, "probe"), "w").close()
    except OSError:
        refused.append(folder)
import huggingface_hub.constants
print(json.dumps({{"refused": refused, "warnings": len(warnings), "hub": huggingface_hub.constants.HF_HUB_CACHE}}))
"""


@pytest.mark.parametrize("user", ["1000:0", "12345:0"])
@pytest.mark.parametrize("name", image_names.IMAGES)
def test_every_cache_can_be_written_also_beside_a_claim(name, user, tmp_path):
    """What is above a mount point belongs to root, as in Kubernetes."""

    def tried(*flags):
        return json.loads(run(name, "-c", TRY_CACHES, flags=(f"--user={user}", *flags)))

    in_tmp, in_claim = (f"{folder}/hub" for folder in (mounts.FALLBACK_HF_HOME, mounts.HF_HOME))
    assert tried() == {"refused": [], "warnings": 0, "hub": in_tmp}
    for mode, hub, warnings in ((0o777, in_claim, 0), (0o555, in_tmp, 1)):
        claim = tmp_path / f"claim-{warnings}"
        claim.mkdir()
        claim.chmod(mode)  # whatever the umask
        seen = tried(
            f"--env=HF_HOME={mounts.HF_HOME}", f"--mount=type=bind,src={claim},dst={mounts.CACHE}"
        )
        assert seen == {"refused": [], "warnings": warnings, "hub": hub}
