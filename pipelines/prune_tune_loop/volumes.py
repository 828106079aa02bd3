"""What of the cluster is mounted into a step's pod, and into those of its nodes: by the config's `storage`."""

from ptl.config.cluster import Storage
from ptl.steps import mounts


def secrets(storage: Storage) -> dict[str, str]:
    """Where each Secret is mounted, by its name: one that serves for several is mounted once."""
    folders = {storage.hf_secret: mounts.HF, storage.mlflow_secret: mounts.MLFLOW, storage.s3_secret: mounts.S3}
    return {name: folder for name, folder in folders.items() if name}


def config_maps(storage: Storage) -> dict[str, str]:
    """Where each ConfigMap is mounted, by its name."""
    folders = {storage.config_map: mounts.CONFIG, storage.ca_config_map: mounts.CA}
    return {name: folder for name, folder in folders.items() if name}


def renamed_keys(storage: Storage) -> dict[str, str]:
    """The variables that name the keys of the S3 Secret, where they are not the usual ones, as in KFP's own Secret."""
    keys = (storage.s3_access_key, storage.s3_secret_key)
    pairs = zip(mounts.S3_KEYS.items(), keys, strict=True)
    return {variable: key for (variable, usual), key in pairs if storage.s3_secret and key != usual}
