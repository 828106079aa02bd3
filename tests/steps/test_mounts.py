"""What a cluster mounts becomes a step's environment."""

import pytest

from ptl.steps import mounts


@pytest.fixture
def root(tmp_path):
    return tmp_path / "ptl"


def volume(root, name, **files):
    """A mounted ConfigMap or Secret, with the links that Kubernetes makes."""
    data = root / name / "..2026_11_25"
    data.mkdir(parents=True, exist_ok=True)
    (root / name / "..data").symlink_to(data.name)
    for key, text in files.items():
        (data / key).write_text(text)
        (root / name / key).symlink_to(f"..data/{key}")


def loaded(root, **environment):
    warnings = mounts.load(environment, str(root))
    return environment, warnings


def test_any_key_of_the_config_map_and_of_the_secrets_is_a_variable_unless_it_is_set(root):
    """As by KFP's MLflow plugin (injectUserEnvVars); a Secret comes before the ConfigMap."""
    volume(root, "config", MLFLOW_TRACKING_URI="http://ours", MLFLOW_TRACKING_TOKEN="of the map", no_proxy="a,b")
    # Files that are no variables are left alone.
    volume(root, "hf", HF_TOKEN="hf_1", **{"ca.crt": "x", "with-dash": "x", "1st": "x"})
    volume(root, "mlflow", MLFLOW_TRACKING_TOKEN="secret\n", KEYSTORE="")
    volume(root, "s3", accesskey="id", secretkey="key")  # names of KFP's own
    (root / "mlflow/KEYSTORE").write_bytes(b"\xff\xfe\x00")
    names = {"PTL_S3_ACCESS_KEY": "accesskey", "PTL_S3_SECRET_KEY": "secretkey"}
    environment, (warning,) = loaded(root, MLFLOW_TRACKING_URI="http://of-the-plugin", **names)
    assert "KEYSTORE is not a variable" in warning
    assert environment == names | {
        "MLFLOW_TRACKING_URI": "http://of-the-plugin",
        "MLFLOW_TRACKING_TOKEN": "secret",
        "no_proxy": "a,b",
        "HF_TOKEN": "hf_1",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
    }


def test_a_mounted_ca_bundle_is_trusted_unless_another_one_is_named(root):
    (root / "ca").mkdir(parents=True)
    (root / "s3").mkdir()  # Kubernetes mounts an empty folder for what is not there
    environment, (warning,) = loaded(root)  # and does not stop the step
    assert environment == {} and "storage.ca_config_map: no ca.crt" in warning
    volume(root, "ca", **{"ca.crt": "-----BEGIN CERTIFICATE-----"})
    bundle = str(root / "ca" / "ca.crt")
    assert loaded(root) == (dict.fromkeys(mounts.BUNDLES, bundle), [])
    environment, (warning,) = loaded(root, SSL_CERT_FILE="/other.crt")  # as where Kubeflow mounts a bundle of its own
    assert environment == {"SSL_CERT_FILE": "/other.crt", "AWS_CA_BUNDLE": bundle, "REQUESTS_CA_BUNDLE": bundle}
    assert "not used for SSL_CERT_FILE" in warning
