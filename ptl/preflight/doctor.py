"""`ptl doctor`: what a run will need is tried out before a GPU hour is spent; each finding is ok, warning or error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ptl import address
from ptl.config.image_names import with_options
from ptl.config.run import Config, check
from ptl.errors import InputError, PtlError
from ptl.preflight import doctor_http as http
from ptl.preflight import doctor_kubernetes, doctor_local, doctor_trainer, gpus
from ptl.preflight.doctor_local import CheckExports, MissingImages
from ptl.preflight.doctor_tracking import tracking_and_store, tracking_uri
from ptl.preflight.finding import Finding, as_finding

OLDEST, RECOMMENDED = "2.14", "2.17"  # releases of Kubeflow Pipelines


def step_environment(config: Config) -> list[Finding]:
    """What a step sees from where this runs: MLflow, the store, accelerators. The doctor's own step checks these."""
    return [*tracking_and_store(config), gpu(config)]


def local(
    config: Config,
    *,
    home: Path,
    missing_images: MissingImages,
    check_exports: CheckExports,
    runner: str = "subprocess",
) -> list[Finding]:
    """What `ptl run` needs on this machine; the Docker engine only where its containers run the steps."""
    doctor_local.track_as_run_does(home)
    model = as_finding("model and data", doctor_local.model_and_data, config)
    packages = as_finding("packages", doctor_local.packages, config, runner)
    findings = [packages, model, *step_environment(config)]
    if model.state == "ok":  # its size says how much the run will write
        findings.append(as_finding("disk", doctor_local.disk, config, home))
    if runner == "docker":
        findings.append(as_finding("images", doctor_local.engine, config, missing_images))
    else:
        findings += doctor_local.exports(config, check_exports, model)
    return findings


def cluster(config: Config, *, host: str | None, namespace: str | None, kubeflow_namespace: str) -> list[Finding]:
    """What a run on Kubeflow needs: images in a registry, a backend of the right version, objects of the namespace.

    MLflow and the store are tried from here where this environment says how; the steps have their own addresses and
    credentials, so what is not set here is a warning.
    """
    findings = tracking_and_store(config, elsewhere=True)
    findings.append(as_finding("images", images, config))
    if host is None:
        findings.append(
            Finding(
                "Kubeflow",
                "warning",
                "not checked: neither --host nor KF_PIPELINES_ENDPOINT is set",
                "give the address of the API; `ptl submit` needs it too",
            )
        )
    else:
        findings.append(as_finding("Kubeflow", kubeflow, config, host))
        # What no option names, the server itself may say.
        if namespace is None:
            namespace = _standalone_namespace(host, kubeflow_namespace)
    return [
        *findings,
        *doctor_kubernetes.cluster_objects(config, namespace, kubeflow_namespace),
        *doctor_trainer.by_kubectl(config, namespace, kubeflow_namespace),
    ]


def _standalone_namespace(host: str, kubeflow_namespace: str) -> str | None:
    """Where the pods of runs start when nobody names a profile: beside Kubeflow, unless it has several users."""
    with contextlib.suppress(PtlError):  # the check of Kubeflow says why
        # A version that does not say it may have several.
        if http.kubeflow_server(host).multi_user is False:
            return kubeflow_namespace
    return None


def names_a_cluster(host: str | None) -> str | None:
    """What of the environment says that the run goes to a cluster; None for a run on this machine."""
    if host:
        return "the address of Kubeflow is given"
    return "MLFLOW_TRACKING_URI is a server" if address.is_server(tracking_uri()) else None


def task(settings: dict[str, Any], experiment: str) -> None:
    """The work of the optional first step of a pipeline. Raises InputError that names every error."""
    config = check(Config, settings, "settings")
    # The run's parameter wins over the config's value.
    storage = config.storage.model_copy(update={"experiment": experiment})
    findings = step_environment(config.model_copy(update={"storage": storage}))
    # A local runner, which names the run by PTL_RUN_ID, trains without Kubeflow Trainer.
    if os.environ.get("KFP_RUN_ID") and not os.environ.get("PTL_RUN_ID"):
        findings += doctor_trainer.in_step(config)

    # All findings go to the step's log, the errors into its message too.
    print(*findings, sep="\n", flush=True)
    lines = "\n".join(str(finding) for finding in findings if finding.state == "error")
    if lines:
        raise InputError(f"doctor:\n{lines}")  # of the input: another attempt would find the same


def exit_code(findings: Iterable[Finding]) -> int:
    """1 when anything is an error."""
    return int(any(finding.state == "error" for finding in findings))


def gpu(config: Config) -> Finding:
    """Whether accelerators that the config asks for are visible here."""
    # On the cluster this step has what prune has; elsewhere the largest step is to fit.
    in_step = bool(os.environ.get("KFP_RUN_ID"))
    steps = ["prune"] if in_step else ["prune", "recover", "evaluate"]
    needed = max(config.resources.accelerators_of(step) for step in steps)
    visible = gpus.visible()
    message = f"{visible} visible here, the config asks for {needed}"
    if visible >= needed:
        return Finding("GPU", "ok", message)
    return Finding(
        "GPU",
        "error" if in_step else "warning",
        message,
        "check resources.accelerator, tolerations and node_selector, and the nodes' device plugin",
    )


def images(config: Config) -> Finding:
    """The steps' images are in the registry, from which the cluster pulls them."""
    names = config.image_names()
    listed = ", ".join(names)
    options = with_options(config.optional_images())
    if not config.images.registry:
        # Nodes that hold the images already (kind, minikube) need no registry.
        if config.resources.image_pull_policy == "Never":
            return Finding("images", "ok", f"the nodes must hold {listed}: resources.image_pull_policy is Never")
        return Finding(
            "images",
            "error",
            "images.registry is not set: a cluster cannot pull from the Docker engine of this machine",
            f"ptl images push --registry HOST/PATH{options}, and set images.registry to it; where the nodes hold the "
            "images already (kind load), set resources.image_pull_policy: Never",
        )
    problems = filter(None, (_registry_problem(name, options) for name in names))
    return next(problems, Finding("images", "ok", f"{listed} can be pulled"))


def _registry_problem(name: str, options: str) -> Finding | None:
    """What keeps a cluster from pulling an image; None where nothing does. `options` are for building the run's."""
    status = http.manifest_status(name)
    if status == 200:
        return None
    # 404 is what a public registry says of a missing image; a private one may ask for a login instead.
    if status == 404:
        return Finding(
            "images",
            "error",
            f"{name} is not in the registry",
            f"ptl images build{options}, then ptl images push{options}, with this registry and tag; or correct "
            "images.registry",
        )
    if status in http.REFUSED:
        return Finding(
            "images",
            "warning",
            f"{name} needs a login ({status}), so it was not checked",
            "make sure that resources.image_pull_secrets names a Secret that can pull them",
        )
    return Finding("images", "error", f"the registry answers {status} for {name}", "is the registry healthy?")


def kubeflow(config: Config, host: str) -> Finding:
    """Kubeflow answers, in a version that takes the compiled YAML."""
    version = http.kubeflow_server(host).version
    if version is None:
        return Finding(
            "Kubeflow",
            "warning",
            f"{host} answers, but does not say its version",
            f"make sure that it is {OLDEST} or newer",
        )
    message = f"{host} is {version}"
    release = http.release(version)
    # An older backend refuses fields that it does not know.
    if release < config.resources.kfp_release:
        major, minor = release
        return Finding(
            "Kubeflow",
            "error",
            f"{message}, the YAML is compiled for {config.resources.kfp} and newer",
            f'upgrade Kubeflow Pipelines, or compile for it, from {OLDEST} on: resources.kfp: "{major}.{minor}"',
        )
    if release < http.release(RECOMMENDED):
        return Finding(
            "Kubeflow", "warning", message, f"it works with {OLDEST} and newer; {RECOMMENDED} is recommended"
        )
    return Finding("Kubeflow", "ok", message)
