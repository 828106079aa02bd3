"""The component folders meet the rules of kubeflow/pipelines-components, as far as they can be checked here."""

import ast
import importlib
import itertools
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.parent.name for path in (ROOT / "components").glob("*/component.py"))
REQUIRED_FIELDS = ["name", "stability", "dependencies", "lastVerified"]  # in this order
OPTIONAL_FIELDS = {"tags", "ci", "links"}  # any other field is refused


def test_there_are_the_five_steps():
    assert {"evaluate", "import_model", "prune", "recover", "report"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_metadata_has_the_fields_of_the_schema_in_order(name):
    metadata = yaml.safe_load((ROOT / "components" / name / "metadata.yaml").read_text())
    assert [field for field in metadata if field not in OPTIONAL_FIELDS] == REQUIRED_FIELDS
    assert metadata["name"] == name and re.fullmatch("[a-z]+(_[a-z]+)*", name)
    assert metadata["stability"] in ("experimental", "alpha", "beta", "stable")
    assert metadata["tags"] and all(isinstance(tag, str) for tag in metadata["tags"])


@pytest.mark.parametrize("name", NAMES)
def test_dependencies_have_full_versions_and_name_pipelines(name):
    dependencies = yaml.safe_load((ROOT / "components" / name / "metadata.yaml").read_text())["dependencies"]
    assert list(dependencies) in (["kubeflow"], ["kubeflow", "external_services"])
    assert "Pipelines" in [entry["name"] for entry in dependencies["kubeflow"]]
    for entry in itertools.chain(*dependencies.values()):
        assert list(entry) == ["name", "version"]
        assert re.fullmatch(r"(>=|<=|==)(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", entry["version"]), entry


@pytest.mark.parametrize("name", NAMES)
def test_it_says_when_it_was_verified(name):
    """The catalogue asks for a time within the last year (docs/contributing-upstream.md); no commit ages into red."""
    verified = yaml.safe_load((ROOT / "components" / name / "metadata.yaml").read_text())["lastVerified"]
    assert isinstance(verified, datetime) and verified.tzinfo is not None, "a timestamp with its zone, not a date"


@pytest.mark.parametrize("name", NAMES)
def test_owners_lists_an_approver_right_after_the_heading(name):
    text = (ROOT / "components" / name / "OWNERS").read_text()
    assert re.search(r"^approvers:\n\s*- \w", text, re.MULTILINE)
    approvers = yaml.safe_load(text)["approvers"]
    assert approvers and all(re.fullmatch(r"[A-Za-z0-9-]+", name) for name in approvers)


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
