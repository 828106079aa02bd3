"""The component folders meet the rules of kubeflow/pipelines-components, as far as they can be checked here."""

import ast
import importlib
import itertools
import re
import runpy
import sys
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from checkout import ROOT
from kfp import compiler

NAMES = sorted(path.parent.name for path in (ROOT / "components").glob("*/component.py"))
REQUIRED_FIELDS = ["name", "stability", "dependencies", "lastVerified"]  # in this order
OPTIONAL_FIELDS = {"tags", "ci", "links"}  # any other field is refused


@pytest.mark.parametrize("name", NAMES)
def test_metadata_has_the_fields_of_the_schema_in_order(name):
    metadata = yaml.safe_load((ROOT / "components" / name / "metadata.yaml").read_text())
    assert [field for field in metadata if field not in OPTIONAL_FIELDS] == REQUIRED_FIELDS
    assert metadata["name"] == name and metadata["stability"] in (
        "experimental",
        "alpha",
        "beta",
        "stable",
    )
    assert metadata["lastVerified"].tzinfo is not None, "a timestamp with its zone, not a date"
    dependencies = metadata["dependencies"]
    assert "Pipelines" in [entry["name"] for entry in dependencies["kubeflow"]]
    for entry in itertools.chain(*dependencies.values()):
        assert list(entry) == ["name", "version"]
        assert re.fullmatch(
            r"(>=|<=|==)(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", entry["version"]
        ), entry
    assert yaml.safe_load((ROOT / "components" / name / "OWNERS").read_text())["approvers"]


@pytest.mark.nightly
def test_each_was_verified_within_the_year_that_the_catalogue_asks_for():
    for name in NAMES:
        verified = yaml.safe_load((ROOT / "components" / name / "metadata.yaml").read_text())[
            "lastVerified"
        ]
        assert datetime.now(UTC) - verified < timedelta(days=365), name


@pytest.mark.parametrize("name", NAMES)
def test_its_code_needs_only_the_standard_library_and_kfp_and_it_compiles_alone(name, tmp_path):
    tree = ast.parse((ROOT / "components" / name / "component.py").read_text())
    tops = {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    tops |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    # KFP could not read annotations that are strings.
    assert {top.partition(".")[0] for top in tops} <= {"kfp", *sys.stdlib_module_names} - {
        "__future__"
    }
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [type(node) for node in function.body] == [ast.ImportFrom, ast.Expr]
    component = getattr(importlib.import_module(f"components.{name}"), name)
    compiler.Compiler().compile(component, str(tmp_path / "component.yaml"))
    spec = yaml.safe_load((tmp_path / "component.yaml").read_text())
    (executor,) = spec["deploymentSpec"]["executors"].values()
    assert re.fullmatch(
        r"python:3\.\d+(-slim)?|ghcr\.io/kubeflow/.+", executor["container"]["image"]
    )
    assert "pip install" not in str(executor)


def test_readmes_are_the_generated_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["component_readmes.py", "--check"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    main = runpy.run_path(str(ROOT / "docs/component_readmes.py"))["main"]
    assert main() == 0, f"run `python docs/component_readmes.py`: {capsys.readouterr().out}"
