"""What a cluster mounts becomes a step's environment."""

from ptl.steps import mounts


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


def test_any_key_of_the_config_map_and_of_the_secrets_is_a_variable_unless_it_is_set(tmp_path):
    """As by KFP's MLflow plugin (injectUserEnvVars); a Secret comes before the ConfigMap."""
    volume(
        tmp_path,
        "config",
        MLFLOW_TRACKING_URI="http://ours",
        MLFLOW_TRACKING_TOKEN="of the map",
        no_proxy="a,b",
    )
    # Files that are no variables are left alone.
    volume(tmp_path, "hf", HF_TOKEN="hf_1", **{"ca.crt": "x", "with-dash": "x", "1st": "x"})
    volume(tmp_path, "mlflow", MLFLOW_TRACKING_TOKEN="secret\n", KEYSTORE="")
    volume(tmp_path, "s3", accesskey="id", secretkey="key")  # names of KFP's own
    (tmp_path / "mlflow/KEYSTORE").write_bytes(b"\xff\xfe\x00")
    names = {"PTL_S3_ACCESS_KEY": "accesskey", "PTL_S3_SECRET_KEY": "secretkey"}
    environment, (warning,) = loaded(tmp_path, MLFLOW_TRACKING_URI="http://of-the-plugin", **names)
    assert "KEYSTORE is not a variable" in warning
    expected = {
        "MLFLOW_TRACKING_URI": "http://of-the-plugin",
        "MLFLOW_TRACKING_TOKEN": "secret",
        "no_proxy": "a,b",
    }
    expected |= {"HF_TOKEN": "hf_1", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
    assert environment == names | expected


def test_keys_that_were_renewed_are_read_again_and_those_of_the_pod_stay(tmp_path):
    volume(tmp_path, "s3", AWS_ACCESS_KEY_ID="old", AWS_SESSION_TOKEN="old")
    environment, _ = loaded(tmp_path, AWS_SESSION_TOKEN="of the pod")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"):
        (tmp_path / "s3" / key).write_text("new")
    mounts.load(environment, str(tmp_path))
    assert environment == {"AWS_ACCESS_KEY_ID": "new", "AWS_SESSION_TOKEN": "of the pod"}


def test_a_renewed_login_in_mlflows_address_is_read_again(tmp_path):
    volume(tmp_path, "mlflow", MLFLOW_TRACKING_URI="http://me:old@ours")
    environment, _ = loaded(tmp_path)
    (tmp_path / "mlflow/MLFLOW_TRACKING_URI").write_text("http://me:new@ours")
    mounts.load(environment, str(tmp_path))
    login = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "new"}
    assert environment == {"MLFLOW_TRACKING_URI": "http://ours"} | login


def test_a_mounted_ca_bundle_is_trusted_unless_another_one_is_named(tmp_path):
    (tmp_path / "ca").mkdir(parents=True)
    (tmp_path / "s3").mkdir()  # Kubernetes mounts an empty folder for what is not there
    environment, (warning,) = loaded(tmp_path)  # and does not stop the step
    assert environment == {} and "storage.ca_config_map: no ca.crt" in warning
    volume(tmp_path, "ca", **{"ca.crt": "-----BEGIN CERTIFICATE-----"})
    bundle = str(tmp_path / "ca" / "ca.crt")
    assert loaded(tmp_path) == (dict.fromkeys(mounts.BUNDLES, bundle), [])
    # as where Kubeflow mounts its own bundle
    environment, (warning,) = loaded(tmp_path, SSL_CERT_FILE="/other.crt")
    assert environment == {
        "SSL_CERT_FILE": "/other.crt",
        "AWS_CA_BUNDLE": bundle,
        "REQUESTS_CA_BUNDLE": bundle,
    }
    assert "not used for SSL_CERT_FILE" in warning
