"""Files that a cluster mounts into a step's pod become its environment, before anything else is imported.

Addresses and credentials reach a pod as optional volumes of a ConfigMap and of Secrets, one file for each key: so a
ConfigMap may hold any variable without a new compile, a missing Secret does not stop a pod, and no variable is there
twice when Kubernetes or a plugin of Kubeflow sets it as well. A variable that is already set wins. Each attempt reads
them again: keys may have been renewed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from ptl import address

ROOT = "/etc/ptl"
CONFIG = f"{ROOT}/config"
S3 = f"{ROOT}/s3"
MLFLOW = f"{ROOT}/mlflow"
HF = f"{ROOT}/hf"
CA = f"{ROOT}/ca"
CACHE = "/mnt/ptl-cache"  # the hub's files, on a volume
HF_HOME = f"{CACHE}/huggingface"
FALLBACK_HF_HOME = "/tmp/cache/huggingface"  # of the images
BUNDLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
# Variables with the names that the S3 Secret has for the two keys, where they are other ones.
S3_KEYS = {"PTL_S3_ACCESS_KEY": "AWS_ACCESS_KEY_ID", "PTL_S3_SECRET_KEY": "AWS_SECRET_ACCESS_KEY"}
READ: dict[str, str] = {}  # variables that came from files, with what these held


def load(environment: MutableMapping[str, str] = os.environ, root: str = ROOT) -> list[str]:
    """Add what is mounted under `root` to the environment; returns warnings, for the step's log."""
    base, warnings = Path(root), []
    others = {name for name, value in environment.items() if value != READ.get(name)}
    variables = {
        environment[name]: variable for name, variable in S3_KEYS.items() if name in environment
    }
    for name in ("s3", "mlflow", "hf", "config"):  # a Secret comes before the ConfigMap
        for path in sorted((base / name).glob("*")):  # its keys
            variable = variables.get(path.name, path.name) if name == "s3" else path.name
            if not path.is_file() or not variable.isidentifier() or variable in others:
                continue
            others.add(variable)
            try:
                # `kubectl create secret --from-file` adds the line's end.
                environment[variable] = READ[variable] = path.read_text().rstrip("\n")
            except (ValueError, OSError) as error:  # bytes that are no text cannot be a variable
                warnings.append(f"warning: {path} is not a variable of the step: {error}")
    # After all variables are there: MLflow's address may come from a Secret.
    login = address.split_login(environment)
    if "MLFLOW_TRACKING_URI" in READ:
        READ.update(login)
    warnings.append(_trust(environment, base / "ca"))
    warnings.append(_cache(environment))
    return [warning for warning in warnings if warning]


def _trust(environment: MutableMapping[str, str], folder: Path) -> str:
    """Trust the mounted CA bundle; returns a warning, or an empty string.

    The folder of an optional volume is there, and empty, when its ConfigMap is not.
    """
    if not folder.is_dir():
        return ""
    bundle = folder / "ca.crt"
    if not bundle.is_file():
        return (
            f"warning: storage.ca_config_map: no ca.crt in {folder}: the ConfigMap is missing, or has no such key; "
            "the public CAs are trusted"
        )
    # A variable that the pod has already wins, as everywhere here.
    path = str(bundle)
    taken = [name for name in BUNDLES if environment.setdefault(name, path) != path]
    if not taken:
        return ""
    return f"storage.ca_config_map: not used for {', '.join(taken)}, which the pod has already"


def _cache(environment: MutableMapping[str, str]) -> str:
    """Without the right to write to the volume of the hub's cache, /tmp serves; returns a warning, or nothing."""
    home = environment.get("HF_HOME", "")
    if not home.startswith(f"{CACHE}/"):
        return ""
    # A volume that was made by hand often belongs to root alone.
    try:
        Path(home).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            return ""
    except OSError as error:
        environment["HF_HOME"] = FALLBACK_HF_HOME
        return (
            f"warning: storage.cache_claim: {home} cannot be written ({error.strerror}), so downloads are not kept: "
            "give group 0 the right to write (docs/install.md, Cache volume)"
        )
