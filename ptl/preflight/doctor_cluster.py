"""What the doctor checks of a cluster: images, Kubeflow's version, the objects that the config names, Trainer."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Any

import yaml

from ptl import connections, kubernetes, processes
from ptl.config.cluster import TRAINED
from ptl.config.image_names import with_options
from ptl.config.run import Config, check
from ptl.errors import InputError
from ptl.kubernetes import DoubtError, NoSuchObjectError
from ptl.preflight.doctor import Finding, as_finding, step_environment, tracking_and_store

OLDEST = "2.14"  # release of Kubeflow Pipelines
CONTROLLER = "workflow-controller-configmap"  # Argo's, in the namespace of Kubeflow
# retry policies under which no failed pod is started again
ONLY_DELETED_PODS = ("OnError", "OnTransientError")
TRAINER = "trainer.kubeflow.org"
TRAINER_API = f"/apis/{TRAINER}/v1alpha1"
INSTALL = "docs/install.md, Kubeflow Trainer"

Health = Callable[[], dict[str, Any]]  # Kubeflow's answer: tag_name, multi_user. Raises PtlError


def cluster(
    config: Config, health: Health | None, namespace: str | None, kubeflow_namespace: str
) -> list[Finding]:
    """What a run on Kubeflow needs: images in a registry, a backend of the right version, objects of the namespace.

    MLflow and the store are tried from here where this environment says how; the steps have their own addresses and
    credentials, so what is not set here is a warning.
    """
    findings = [*tracking_and_store(config, elsewhere=True), as_finding("images", images, config)]
    if health is None:
        message = "not checked: neither --host nor KF_PIPELINES_ENDPOINT is set"
        remedy = "give the address of the API; `ptl submit` needs it too"
        findings.append(Finding("Kubeflow", "warning", message, remedy))
    else:
        findings.append(as_finding("Kubeflow", kubeflow, config, health))
        # Where nobody names a profile, pods start beside Kubeflow, unless it has several users.
        if (
            namespace is None
            and findings[-1].state != "error"
            and health().get("multi_user") is False
        ):
            namespace = kubeflow_namespace
    namespace = namespace or kubernetes.context_namespace()
    return [*findings, *_forbidden_together(objects(config, namespace, kubeflow_namespace))]


def task(settings: dict[str, Any], experiment: str) -> None:
    """The work of the optional first step of a pipeline. Raises InputError that names every error."""
    config = check(Config, settings, "settings")
    # The run's parameter wins over the config's value.
    storage = config.storage.model_copy(update={"experiment": experiment})
    findings = step_environment(config.model_copy(update={"storage": storage}))
    # A local runner, which names the run by PTL_RUN_ID, trains without Kubeflow Trainer.
    if processes.on_a_cluster():
        findings += trainer_in_step(config)
    # All findings go to the step's log, the errors into its message too.
    print(*findings, sep="\n", flush=True)
    lines = "\n".join(str(finding) for finding in findings if finding.state == "error")
    if lines:
        raise InputError(f"doctor:\n{lines}")  # of the input: another attempt would find the same


def images(config: Config) -> str:
    """The steps' images are in the registry, from which the cluster pulls them; asked by the docker command's login."""
    names = config.image_names()
    listed = ", ".join(names)
    options = with_options(config.optional_images())
    # Nodes that hold the images already (kind, minikube) need no registry.
    if config.resources.image_pull_policy == "Never":
        return f"the nodes must hold {listed}: resources.image_pull_policy is Never"
    if not config.images.registry:
        raise InputError(
            "images.registry is not set: a cluster cannot pull from the Docker engine of this machine",
            remedy=f"ptl images push --registry HOST/PATH{options}, and set images.registry to it; where the nodes "
            "hold the images already (kind load), set resources.image_pull_policy: Never",
        )
    for name in names:
        problem = _docker_problem("manifest", "inspect", name)
        if re.search("no such manifest|manifest.unknown", problem, re.IGNORECASE):
            raise InputError(
                f"{name} is not in the registry, or hidden from this login",
                remedy=f"ptl images build{options}, then ptl images push{options}, with this registry and tag; or "
                "correct images.registry",
            )
        if problem:
            # Docker is written in Go, whose errors end with their cause.
            raise DoubtError(
                f"{name} was not checked: {connections.shortened(problem.split(': ')[-1])}",
                remedy="log in (docker login), and make sure that resources.image_pull_secrets names a Secret for it",
            )
    return f"{listed} can be pulled"


def _docker_problem(*words: str) -> str:
    """What a docker command that fails says; empty where it succeeds."""
    try:
        done = subprocess.run(
            ["docker", *words], capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError:
        return "there is no command docker here"
    except (OSError, subprocess.TimeoutExpired) as error:
        return connections.sentence("docker", error)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""


def kubeflow(config: Config, health: Health) -> str:
    """Kubeflow answers, in a version that takes the compiled YAML."""
    version = str(health().get("tag_name"))
    release = re.match(r"v?(\d+)\.(\d+)", version)
    if release is None:  # a build of somebody's own may have any tag
        raise DoubtError(
            f"answers, with version {version!r}", remedy=f"make sure that it is {OLDEST} or newer"
        )
    # An older backend refuses fields that it does not know.
    if (int(release[1]), int(release[2])) < config.resources.kfp_release:
        raise InputError(
            f"it is {version}, the YAML is compiled for {config.resources.kfp} and newer",
            remedy=f'upgrade Kubeflow Pipelines, or compile for it, from {OLDEST} on: resources.kfp: "{release[1]}.'
            f'{release[2]}"',
        )
    return f"it is {version}"


def objects(config: Config, namespace: str | None, kubeflow_namespace: str) -> list[Finding]:
    """The retry policy, and in the runs' namespace the ConfigMaps, Secrets and the claim that the config names."""
    policy = as_finding("retry policy", retry_policy, kubeflow_namespace)
    if namespace is None:
        remedy = "give --namespace, or set KFP_NAMESPACE: your profile in multi-user Kubeflow"
        return [
            policy,
            Finding(
                "objects", "warning", "not checked: the namespace of the run is not known", remedy
            ),
        ]
    storage, secrets = config.storage, config.resources.image_pull_secrets
    # Without the former no run works; without the latter one may: a cloud identity needs no keys, a public model no
    # token, and without a bundle the steps trust the public CAs.
    needed = {
        "configmap": [storage.config_map],
        "persistentvolumeclaim": [storage.cache_claim],
        "secret": secrets,
    }
    optional = {
        "configmap": [storage.ca_config_map],
        "secret": [storage.s3_secret, storage.mlflow_secret, storage.hf_secret],
    }
    findings = [policy]
    for missing, kinds in ((InputError, needed), (DoubtError, optional)):
        for kind, name in [
            (kind, name) for kind, names in kinds.items() for name in names if name is not None
        ]:
            path = f"/api/v1/namespaces/{namespace}/{kind}s/{name}"
            remedy = (
                f"make it (manifests/overlays/*/runs), or set the field that names {name} to null"
            )
            if kind == "secret" and name in secrets:
                remedy = "make it (kubectl create secret docker-registry), or take it out of image_pull_secrets"
            findings.append(
                as_finding(
                    f"{kind} {name}", _exists, path, f"is not in {namespace}", remedy, missing
                )
            )
    return [*findings, *trainer(config, namespace)]


def _forbidden_together(findings: list[Finding]) -> list[Finding]:
    """One finding in the place of all those that this account may not look at."""
    forbidden = [finding for finding in findings if finding.rule]
    if not forbidden:
        return findings
    subjects = ", ".join(finding.subject for finding in forbidden)
    rules = "; ".join(dict.fromkeys(finding.rule for finding in forbidden))
    together = Finding(
        "rights",
        "warning",
        f"not checked, because this account may not look: {subjects}",
        f"a Role that lets it {rules}; or resources.doctor: true, which checks from a step's pod",
    )
    return [*(finding for finding in findings if not finding.rule), together]


def _exists(path: str, problem: str, remedy: str, missing: type[InputError] = InputError) -> str:
    try:
        kubernetes.read(path)
    except NoSuchObjectError as error:
        raise missing(problem, remedy=remedy) from error
    return "is there"


def retry_policy(kubeflow_namespace: str) -> str:
    """The workflow controller's default retries start no failed pod again."""
    config_map = kubernetes.read(f"/api/v1/namespaces/{kubeflow_namespace}/configmaps/{CONTROLLER}")
    # Each level may be missing, or null.
    section = yaml.safe_load((config_map.get("data") or {}).get("workflowDefaults", ""))
    for key in ("spec", "templateDefaults", "retryStrategy"):
        section = (section or {}).get(key)
    if not section:
        return "no default: failed attempts are repeated in the step's pod"
    policy = section.get("retryPolicy", "OnFailure")  # Argo's own default
    if policy in ONLY_DELETED_PODS:
        return f"{policy}: failed attempts are repeated in the step's pod"
    raise DoubtError(
        f"{policy} (limit {section.get('limit', 'none')}) is the default for every template, so the cluster repeats a "
        "failed step at every level of the DAG: with a limit of 2, one was started 36 times. Attempts are counted in "
        "the store: each pod after resources.retries + 1 ends at once, but it is started and waited for",
        remedy=f"ask the administrator for retryPolicy: OnError in {CONTROLLER} (Kubeflow 2.17's own), or no default",
    )


def trainer(config: Config, namespace: str) -> list[Finding]:
    """What a recovery on several nodes needs: Kubeflow Trainer and the TrainingRuntime; nothing on single nodes."""
    if config.resources.nodes_of(TRAINED) == 1:
        return []
    name = config.resources.of_step(TRAINED).runtime
    path = f"{TRAINER_API}/namespaces/{namespace}/trainingruntimes/{name}"
    absent = "is not installed, and recover on several nodes needs it"
    remedy = f"install Kubeflow Trainer 2.3 ({INSTALL}), or remove resources.steps.recover.nodes"
    make = f"make it ({INSTALL}), or set resources.steps.recover.runtime"
    return [
        as_finding("Kubeflow Trainer", _exists, TRAINER_API, absent, remedy),
        as_finding("JobSet", _exists, "/apis/jobset.x-k8s.io", absent, remedy),
        as_finding(f"trainingruntime {name}", _exists, path, f"is not in {namespace}", make),
    ]


def trainer_in_step(config: Config) -> list[Finding]:
    """The same from a step's pod, which must be allowed to make the nodes."""
    if config.resources.nodes_of(TRAINED) == 1:
        return []
    if not kubernetes.NAMESPACE.is_file():
        remedy = "give the account of the steps a token: it creates the nodes"
        return [
            Finding(
                "Kubeflow Trainer", "error", "the pod has no token of a service account", remedy
            )
        ]
    namespace = kubernetes.NAMESPACE.read_text().strip()
    return [*trainer(config, namespace), as_finding("rights", _may_train, namespace)]


def _may_train(namespace: str) -> str:
    if not kubernetes.may(namespace, "create", TRAINER, "trainjobs"):
        raise InputError(
            f"may not create trainjobs in {namespace}",
            remedy=f"give the Role ptl-recover ({INSTALL})",
        )
    return f"may create trainjobs in {namespace}"
