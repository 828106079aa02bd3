"""What a cluster mounts becomes a step's environment, and model-written code cannot read it."""

import os

import pytest

from ptl.sandbox import runner
from ptl.steps import mounts


@pytest.fixture
def root(tmp_path):
    return tmp_path / "ptl"


def volume(root, name, **files):
    """A mounted ConfigMap or Secret, with the links that Kubernetes makes."""
    data = root / name / "..2026_11_25"
    data.mkdir(parents=True)
    (root / name / "..data").symlink_to(data.name)
    for key, text in files.items():
        (data / key).write_text(text)
        (root / name / key).symlink_to(f"..data/{key}")


def loaded(root, **environment):
    warnings = mounts.load(environment, str(root))
    return environment, warnings


def test_any_key_of_the_config_map_and_of_the_secrets_is_a_variable(root):
    volume(root, "config", MLFLOW_TRACKING_URI="http://mlflow", NCCL_DEBUG="INFO", no_proxy="a,b")
    volume(root, "mlflow", MLFLOW_TRACKING_USERNAME="ptl", MLFLOW_TRACKING_PASSWORD="secret\n")
    volume(root, "hf", HF_TOKEN="hf_1")
    environment, warnings = loaded(root)
    assert environment == {
        "MLFLOW_TRACKING_URI": "http://mlflow",
        "NCCL_DEBUG": "INFO",
        "no_proxy": "a,b",
        "MLFLOW_TRACKING_USERNAME": "ptl",
        "MLFLOW_TRACKING_PASSWORD": "secret",
        "HF_TOKEN": "hf_1",
    }
    assert warnings == []


def test_what_is_set_already_wins_and_a_secret_comes_before_the_config_map(root):
    """As where KFP's MLflow plugin sets MLFLOW_TRACKING_URI (injectUserEnvVars)."""
    volume(root, "config", MLFLOW_TRACKING_URI="http://ours", MLFLOW_TRACKING_TOKEN="of the map")
    volume(root, "mlflow", MLFLOW_TRACKING_TOKEN="of the secret")
    environment, _ = loaded(root, MLFLOW_TRACKING_URI="http://of-the-plugin")
    assert environment == {"MLFLOW_TRACKING_URI": "http://of-the-plugin", "MLFLOW_TRACKING_TOKEN": "of the secret"}


def test_files_that_are_no_variables_are_left_alone(root):
    volume(root, "config", **{"ca.crt": "x", "with-dash": "x", "1st": "x", "GOOD": "y"})
    assert loaded(root)[0] == {"GOOD": "y"}


def test_a_key_that_is_no_text_is_a_warning(root, monkeypatch):
    for name in ("GOOD", "KEYSTORE", "NUL"):
        monkeypatch.setenv(name, "so that it is as before after the test")
        monkeypatch.delenv(name)
    volume(root, "mlflow", GOOD="t")
    for name, data in (("KEYSTORE", b"\xff\xfe\x00"), ("NUL", b"a\0b")):
        (root / "mlflow" / name).write_bytes(data)
    warnings = mounts.load(os.environ, str(root))
    assert os.environ["GOOD"] == "t" and not {"KEYSTORE", "NUL"} & set(os.environ)
    assert [warning.partition(" is not")[0].rpartition("/")[2] for warning in warnings] == ["KEYSTORE", "NUL"]


def test_kfps_own_s3_keys_are_renamed(root):
    volume(root, "s3", accesskey="id", secretkey="key")
    environment, _ = loaded(root, PTL_S3_ACCESS_KEY="accesskey", PTL_S3_SECRET_KEY="secretkey")
    assert (environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]) == ("id", "key")


def test_optional_volumes_that_are_missing_change_nothing(root):
    assert loaded(root) == ({}, [])
    (root / "s3").mkdir(parents=True)  # Kubernetes mounts an empty folder for a Secret that is not there
    assert loaded(root, PTL_S3_ACCESS_KEY="accesskey") == ({"PTL_S3_ACCESS_KEY": "accesskey"}, [])


def test_a_mounted_ca_bundle_is_trusted_unless_another_one_is_named(root):
    volume(root, "ca", **{"ca.crt": "-----BEGIN CERTIFICATE-----"})
    bundle = str(root / "ca" / "ca.crt")
    assert loaded(root) == (dict.fromkeys(mounts.BUNDLES, bundle), [])
    environment, (said,) = loaded(root, SSL_CERT_FILE="/other.crt")  # as where Kubeflow mounts a bundle of its own
    assert environment == {"SSL_CERT_FILE": "/other.crt", "AWS_CA_BUNDLE": bundle, "REQUESTS_CA_BUNDLE": bundle}
    assert said == "storage.ca_config_map: not used for SSL_CERT_FILE, which the pod has already"


def test_a_missing_ca_bundle_is_said_and_does_not_stop_the_step(root):
    (root / "ca").mkdir(parents=True)
    environment, (warning,) = loaded(root)
    assert environment == {} and "storage.ca_config_map: no ca.crt" in warning and "public CAs" in warning


def test_a_cache_that_can_be_written_is_used(root, tmp_path, monkeypatch):
    monkeypatch.setattr(mounts, "CACHE", str(tmp_path / "claim"))
    environment, warnings = loaded(root, HF_HOME=f"{tmp_path}/claim/huggingface")
    assert environment == {"HF_HOME": f"{tmp_path}/claim/huggingface"} and warnings == []


def test_a_cache_that_cannot_be_written_gives_a_warning_and_tmp_is_used(root, tmp_path, monkeypatch):
    (tmp_path / "claim").write_text("a file where the folder should be, which root cannot write into either")
    monkeypatch.setattr(mounts, "CACHE", str(tmp_path / "claim"))
    environment, (warning,) = loaded(root, HF_HOME=f"{tmp_path}/claim/huggingface")
    assert environment["HF_HOME"] == mounts.FALLBACK_HF_HOME and "storage.cache_claim" in warning


def test_a_cache_of_the_users_own_is_not_looked_at(root):
    assert loaded(root, HF_HOME="/nowhere/at/all") == ({"HF_HOME": "/nowhere/at/all"}, [])


def test_model_written_code_cannot_read_the_mounted_files(root):
    volume(root, "s3", AWS_SECRET_ACCESS_KEY="secret")
    path = root / "s3" / "AWS_SECRET_ACCESS_KEY"
    assert path.read_text() == "secret"
    code = f"""
def found():
    try:
        return open({str(path)!r}).read()
    except OSError:
        return "denied"
"""
    outcome = runner.run_tests(code, "assert found() == 'denied'")
    assert outcome.passed, outcome
