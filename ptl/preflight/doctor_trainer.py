"""What a recover step on several nodes needs: Kubeflow Trainer, the TrainingRuntime, and the rights of the account.

`ptl doctor` asks by kubectl for the account of the steps; the doctor's step asks for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ptl.config.cluster import TRAINED
from ptl.config.run import Config
from ptl.preflight import in_cluster, kubectl
from ptl.preflight.finding import Finding
from ptl.preflight.kubectl import NoSuchObjectError, NotSeenError

GROUP = "trainer.kubeflow.org"
API = f"/apis/{GROUP}/v1alpha1"
NODE = "node"  # the job of a runtime that trains
# What the step does: verb, group, resource, subresource.
RIGHTS = (
    ("create", GROUP, "trainjobs", ""),
    ("get", GROUP, "trainjobs", ""),
    ("delete", GROUP, "trainjobs", ""),
    ("get", "", "pods", ""),
    ("list", "", "pods", ""),
    ("get", "", "pods", "log"),
)
# The accounts with which Kubeflow starts steps.
STANDALONE, PROFILE = "pipeline-runner", "default-editor"
# Kubernetes' and JobSet's values where a runtime says nothing.
RESTART_POLICY, BACKOFF_LIMIT = "OnFailure", 6

SUBJECT = "Kubeflow Trainer"
INSTALL = "manifests/components/trainer, see docs/install.md"

Read = Callable[[str], dict[str, Any]]  # the answer at a path of the Kubernetes API
May = Callable[..., bool]  # whether the account has one of RIGHTS in a namespace


def by_kubectl(config: Config, namespace: str | None, kubeflow_namespace: str) -> list[Finding]:
    """What kubectl says; nothing for a run on single nodes. `namespace` is where the steps' pods start."""
    if not _needed(config):
        return []
    if namespace is None:
        return [_not_seen(SUBJECT, "the namespace of the run is not known", "give --namespace, or set KFP_NAMESPACE")]
    account = STANDALONE if namespace == kubeflow_namespace else PROFILE
    return _findings(config, namespace, account, kubectl.read, partial(kubectl.may, account))


def in_step(config: Config) -> list[Finding]:
    """The same from a step's pod; nothing for a run on single nodes."""
    if not _needed(config):
        return []
    try:
        namespace = in_cluster.namespace()
    except NotSeenError as error:
        return [Finding(SUBJECT, "error", str(error), "give the account of the steps a token: it creates the nodes")]
    return _findings(config, namespace, "the steps' account", in_cluster.read, in_cluster.may)


def _needed(config: Config) -> bool:
    return config.resources.nodes_of(TRAINED) > 1


def _findings(config: Config, namespace: str, account: str, read: Read, may: May) -> list[Finding]:
    trainer = served(read)
    # Without it there is no runtime, and who cannot see it sees no runtime either.
    if trainer.state != "ok":
        return [trainer]
    return [
        trainer,
        runtime(config.resources.of_step(TRAINED).runtime, namespace, read),
        rights(account, namespace, may),
    ]


def served(read: Read) -> Finding:
    """Whether the cluster has TrainJobs."""
    try:
        kinds = [resource["name"] for resource in read(API)["resources"]]
    except NoSuchObjectError:
        kinds = []
    except NotSeenError as error:
        return _not_seen(
            SUBJECT, str(error), "make sure that the Kubernetes API can be reached from here, with these rights"
        )
    if "trainjobs" in kinds:
        return Finding(SUBJECT, "ok", f"the cluster has TrainJobs ({API.removeprefix('/apis/')})")
    return Finding(
        SUBJECT,
        "error",
        f"the cluster has no trainjobs.{GROUP}, which recover on several nodes needs",
        "ask the administrator for Kubeflow Trainer 2.3 (docs/install.md), or remove resources.steps.recover.nodes",
    )


def runtime(name: str, namespace: str, read: Read) -> Finding:
    """Whether the TrainingRuntime exists, and restarts all nodes together."""
    subject = f"trainingruntime {name}"
    try:
        spec = read(f"{API}/namespaces/{namespace}/trainingruntimes/{name}")["spec"]
    except NoSuchObjectError:
        return Finding(
            subject, "error", f"is not in {namespace}", f"make it ({INSTALL}), or set resources.steps.recover.runtime"
        )
    except NotSeenError as error:
        return _not_seen(subject, str(error), "check by hand that it exists")
    in_place = restarts_in_place(spec)
    if not in_place:
        return Finding(subject, "ok", f"is in {namespace}")
    return Finding(
        subject,
        "warning",
        f"restarts a node alone ({', '.join(in_place)}): the others wait for it until they time out, and a wrong input "
        "is tried again for minutes",
        f"use restartPolicy Never and backoffLimit 0, with which all nodes start again together ({INSTALL})",
    )


def restarts_in_place(spec: dict[str, Any]) -> list[str]:
    """What of a runtime's spec restarts a node's container or pod by itself."""
    jobset = spec["template"]["spec"]
    settings = []
    if jobset.get("failurePolicy", {}).get("restartStrategy") == "InPlaceRestart":
        settings.append("restartStrategy InPlaceRestart")
    # Beside the nodes a runtime may have jobs that load model and data.
    for job in [job["template"]["spec"] for job in jobset["replicatedJobs"] if job["name"] == NODE]:
        limit = job.get("backoffLimit", BACKOFF_LIMIT)
        if limit:
            settings.append(f"backoffLimit {limit}")
        policy = job["template"]["spec"].get("restartPolicy", RESTART_POLICY)
        if policy != "Never":
            settings.append(f"restartPolicy {policy}")
    return settings


def rights(account: str, namespace: str, may: May) -> Finding:
    """Whether the account may do what the step does."""
    subject = f"rights of {account}"
    try:
        refused = [right for right in RIGHTS if not may(*right, namespace)]
    except NotSeenError as error:
        return _not_seen(subject, str(error), "resources.doctor: true has the run's first step ask for itself")
    if not refused:
        return Finding(subject, "ok", f"may create TrainJobs and read their pods in {namespace}")
    names = [f"{verb} {'/'.join(filter(None, (resource, part)))}" for verb, _, resource, part in refused]
    return Finding(
        subject,
        "error",
        f"may not {', '.join(names)} in {namespace}",
        f"give it the Role ptl-recover ({INSTALL}); runs of another account (ptl submit --service-account) need it for "
        "that one",
    )


def _not_seen(subject: str, reason: str, remedy: str) -> Finding:
    return Finding(subject, "warning", f"not checked: {reason}", remedy)
