"""Compiled configs: each is compiled once by the process that asks for it."""

import tempfile
from pathlib import Path

import yaml
from checkout import TINY

from pipelines.prune_tune_loop.compact import Loader
from pipelines.prune_tune_loop.pipeline import compile_pipeline
from ptl.config.run import load_config

TEXTS = {}  # by config


def text(config):
    """The YAML of a config."""
    key = config.model_dump_json()
    if key not in TEXTS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "pipeline.yaml")
            compile_pipeline(config, path)
            TEXTS[key] = path.read_text()
    return TEXTS[key]


def write(config, path):
    """In the place of `compile_pipeline`."""
    path.write_text(text(config))


def documents(sets=None, path=TINY):
    """The pipeline spec and the platform spec, which a test may change."""
    return list(yaml.load_all(text(load_config(path, sets)), Loader))
