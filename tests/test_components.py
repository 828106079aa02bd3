"""The component folders meet the rules of kubeflow/pipelines-components, as far as they can be checked here."""

import ast
import importlib
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.parent.name for path in (ROOT / "components").glob("*/component.py"))


def test_there_are_the_five_steps():
    assert {"evaluate", "import_model", "prune", "recover", "report"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_metadata_has_the_fields_of_the_schema(name):
    meta = yaml.safe_load((ROOT / "components" / name / "metadata.yaml").read_text())
    assert meta["name"] == name and re.fullmatch("[a-z]+(_[a-z]+)*", name)
    assert meta["tier"] in ("core", "third_party") and meta["stability"] in ("alpha", "beta", "stable")
    assert {"name": "Pipelines", "version": ">=2.14"} in meta["dependencies"]["kubeflow"]
    assert all(set(entry) == {"name", "version"} for entry in meta["dependencies"]["external_services"])
    assert meta["tags"] and all(isinstance(tag, str) for tag in meta["tags"])
    assert meta["lastVerified"].astimezone(UTC) > datetime(2026, 1, 1, tzinfo=UTC)
    owners = yaml.safe_load((ROOT / "components" / name / "OWNERS").read_text())
    assert set(owners) == {"approvers", "reviewers"}


@pytest.mark.parametrize("name", NAMES)
def test_only_the_standard_library_and_kfp_are_imported_at_the_top(name):
    tree = ast.parse((ROOT / "components" / name / "component.py").read_text())
    tops = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    tops |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {top.partition(".")[0] for top in tops} <= {"kfp", *sys.stdlib_module_names}
    assert "__future__" not in tops  # KFP could not read the annotations


@pytest.mark.parametrize("name", NAMES)
def test_it_is_exposed_compiles_alone_and_has_an_allowed_base_image(name, tmp_path):
    from kfp import compiler

    component = getattr(importlib.import_module(f"components.{name}"), name)
    compiler.Compiler().compile(component, str(tmp_path / "component.yaml"))
    spec = yaml.safe_load((tmp_path / "component.yaml").read_text())
    (executor,) = spec["deploymentSpec"]["executors"].values()
    assert re.fullmatch(r"python:3\.\d+(-slim)?|ghcr\.io/kubeflow/.+", executor["container"]["image"])
    assert "pip install" not in str(executor)


@pytest.mark.parametrize("name", NAMES)
def test_its_body_is_one_import_and_one_call(name):
    tree = ast.parse((ROOT / "components" / name / "component.py").read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [type(node) for node in function.body] == [ast.ImportFrom, ast.Expr]


def test_readmes_are_the_generated_ones():
    done = subprocess.run(
        [sys.executable, "docs/component_readmes.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run `python docs/component_readmes.py`: {done.stdout}{done.stderr[-500:]}"
