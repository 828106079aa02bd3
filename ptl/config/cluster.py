"""What a config says about the cluster: resources of the steps, and where addresses and credentials come from.

Addresses and credentials are never in the config, so never in the compiled YAML: they come from a ConfigMap and from
Secrets of the cluster, all optional. A step names what it misses; on one machine addresses come from the environment,
S3 keys from wherever boto3 finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, model_validator

from ptl.config.base import Label, Positive, Section, one_error
from ptl.processes import RETRIES, RETRY_WAIT

StepName = Literal[
    "import-model",
    "prune",
    "recover",
    "evaluate",
    "export-gguf",
    "export-compressed-tensors",
    "report",
]
# Kubernetes' quantities, and names of its objects.
Quantity = Annotated[
    Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")],
    one_error("must be a quantity of Kubernetes, for example 4, 500m or 64Gi"),
]
Name = Annotated[
    Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")],
    one_error(
        "must be text of small letters, digits, hyphens and dots, and begin and end with a letter or digit"
    ),
]
# Pods carry it as a label's value.
Queue = Annotated[
    Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")],
    one_error("must be text of small letters, digits, hyphens and dots, up to 63"),
]
# Kubeflow names a volume after what it holds, and a volume's name is a DNS label.
Mounted = Label
# Without a domain Kubernetes takes its own resources alone: cpu, memory, and no gpu.
Accelerator = Annotated[
    Annotated[
        str,
        Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"),
    ],
    one_error(
        "must be a Kubernetes resource with the domain of its vendor, for example nvidia.com/gpu"
    ),
]

RegisteredModel = Annotated[
    Annotated[str, Field(max_length=250, pattern=r"^[^/:'\"`]+$")],
    one_error(
        "must be a name that MLflow's registry takes: up to 250 characters, without / : and quotes"
    ),
]

TRAINED = "recover"  # the kind of step that several nodes can do together
# Deadlines.
# seconds of a timeout that are left to the start of a pod: its image, volumes and inputs
START = 300
# seconds: Argo needs a number, and takes one hour where it is given none
WITHOUT_TIMEOUT = 30 * 24 * 60 * 60


class Toleration(Section):
    """A taint of nodes on which a step may run nevertheless."""

    key: str = Field(min_length=1)
    """for example nvidia.com/gpu"""
    value: str | None = None
    """only a taint with this value (operator Equal); default: with any (operator Exists)"""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """default: all effects"""

    @property
    def operator(self) -> str:
        """As Kubernetes calls it."""
        return "Exists" if self.value is None else "Equal"


class StepResources(Section):
    """Other values for one kind of step; a field that is left out has the value for all steps."""

    accelerators: NonNegativeInt | None = None
    """accelerators of the step"""
    cpu: Quantity | None = None
    """CPU cores"""
    memory: Quantity | None = None
    """for example 64Gi"""
    shm: Quantity | None = None
    """size of /dev/shm; it counts as memory"""
    timeout: Positive | None = None
    """wall-clock seconds that each attempt may take"""
    nodes: Positive = 1
    """machines that train together (recover only); on a cluster, from 2 on, by Kubeflow Trainer. All fields are then
    those of one node"""
    runtime: Name = "ptl-recover"
    """Kubeflow Trainer's TrainingRuntime, in the namespace of the runs, from which the nodes are made"""


class Resources(Section):
    """What a step requests from the cluster.

    On one machine only `timeout`, `retries`, `control` and `doctor` apply.
    """

    # Size of a step's pod.
    accelerator: Accelerator | None = None
    """for example nvidia.com/gpu"""
    accelerators: NonNegativeInt = 0
    """accelerators of a recover and of an evaluate step; a prune step and an export to compressed-tensors take one"""
    cpu: Quantity | None = None
    """CPU cores, for example 8"""
    memory: Quantity | None = None
    """for example 64Gi"""
    shm: Quantity | None = None
    """size of /dev/shm of prune, recover and evaluate; it counts as memory"""

    # Time and attempts.
    timeout: int | None = Field(
        None,
        ge=1,
        description="wall-clock seconds that each attempt of a step may take, including the start of its pod, for "
        "which up to 5 minutes (at most a quarter) are reserved",
    )
    retries: int | None = Field(
        None,
        ge=0,
        le=10,
        description="how often a failed step is retried, in its pod or in another one; finished work is not repeated, "
        "and an input error is never retried. Default: 2 on a cluster, 0 on one machine",
    )
    retry_wait: ClassVar[int] = RETRY_WAIT  # seconds before the first retry, doubled each time
    control: Literal["beside", "after"] = "beside"
    """when the control arm runs: next to the loop (`beside`), or `after` it, for a cluster with one accelerator"""

    # Which nodes, queues and images.
    tolerations: tuple[Toleration, ...] = ()
    """tolerations of prune, recover, evaluate and export-compressed-tensors"""
    node_selector: dict[str, str] = Field({})
    """labels of the nodes for the same steps, for example nvidia.com/gpu.product"""
    queue: Queue | None = None
    """Kueue LocalQueue"""
    image_pull_secrets: tuple[Name, ...] = ()
    """Secrets with the login of the image registry"""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """`Never`: the nodes already have the images; default: Kubernetes' own"""

    # What the backend takes, and who the steps run as.
    kfp: Literal["2.14", "2.15", "2.16", "2.17"] = Field(
        "2.17",
        description="oldest KFP backend that must accept the YAML; a backend refuses fields that it does not know. "
        "Below 2.16 there is no security context",
    )
    run_as_user: ClassVar[int] = 1000  # not root; with KFP 2.16 and newer
    run_as_group: ClassVar[int] = 0  # the images need group 0, which has no privileges by itself
    doctor: bool = False
    """start with a step that tries MLflow, the store and the accelerators"""
    steps: dict[StepName, StepResources] = Field({})
    """other values for one kind of step"""

    @property
    def kfp_release(self) -> tuple[int, int]:
        """`kfp` as numbers, to compare."""
        major, minor = map(int, self.kfp.split("."))
        return major, minor

    @property
    def attempts(self) -> int:
        """Attempts of a step on a cluster, the first one included."""
        return 1 + (RETRIES if self.retries is None else self.retries)

    def of_step(self, stage: str) -> StepResources:
        """What `steps` says of a kind of step; nothing for one that it does not name."""
        own: Mapping[Any, StepResources] = self.steps
        return own.get(stage, StepResources())

    def accelerators_of(self, stage: str) -> int:
        """Accelerators that a kind of step requests: those it uses, unless `steps` says otherwise."""
        own = self.of_step(stage).accelerators
        if own is not None:
            return own
        if stage in ("recover", "evaluate"):
            return self.accelerators
        # Scores for pruning and quantized weights are computed on one, and the others need none.
        return min(1, self.accelerators) if stage in ("prune", "export-compressed-tensors") else 0

    def nodes_of(self, stage: str) -> int:
        """Machines that do a kind of step together."""
        return self.of_step(stage).nodes

    def timeout_of(self, stage: str) -> int | None:
        """Wall-clock seconds that one attempt of a kind of step may take; None: no limit."""
        own = self.of_step(stage).timeout
        return self.timeout if own is None else own

    def work_timeout(self, stage: str) -> int | None:
        """The seconds of a timeout that an attempt's work may take.

        A pod's deadline counts from before its image is pulled, and kills without a word: the work must end before it.
        """
        timeout = self.timeout_of(stage)
        if timeout is None:
            return None
        return timeout - min(START, timeout // 4)

    def window(self, stage: str) -> int:
        """Wall-clock seconds within which all attempts of a kind of step end, the pauses between them included."""
        timeout = self.timeout_of(stage)
        if timeout is None:
            return WITHOUT_TIMEOUT
        # All pauses but none after the last attempt.
        pauses = self.retry_wait * (2 ** (self.attempts - 1) - 1)  # 1 + 2 + 4 + ... times the first
        return self.attempts * timeout + pauses

    @model_validator(mode="after")
    def _steps_fit(self) -> Resources:
        for name, step in self.steps.items():
            if step.nodes > 1 and name != TRAINED:
                raise ValueError(
                    f"nodes={step.nodes} of {name}: only recover runs on several nodes; remove it there"
                )
        # Kubernetes counts a named resource, such as nvidia.com/gpu.
        if (
            any([self.accelerators, *(step.accelerators for step in self.steps.values())])
            and not self.accelerator
        ):
            raise ValueError(
                "accelerators without accelerator: name the resource, for example nvidia.com/gpu"
            )
        return self


class Storage(Section):
    """Where runs are tracked; checkpoints are stored under the experiment's artifact location."""

    experiment: str = Field("ptl", min_length=1)
    """MLflow experiment"""
    registered_model: RegisteredModel | None = None
    """name in the MLflow registry, without / : and quotes; default: the config's name"""

    # Where the pods get addresses and credentials; a name that is null is not mounted.
    config_map: Mounted | None = "ptl"
    """ConfigMap with MLFLOW_TRACKING_URI and other environment variables"""
    s3_secret: Mounted | None = "ptl-s3"
    """Secret with the S3 keys; not needed with a cloud identity"""
    s3_access_key: str = "AWS_ACCESS_KEY_ID"
    """key of the access key in that Secret; in KFP's own Secret it is `accesskey`"""
    s3_secret_key: str = "AWS_SECRET_ACCESS_KEY"
    """key of the secret key in that Secret; in KFP's own it is `secretkey`"""
    mlflow_secret: Mounted | None = "ptl-mlflow"
    """Secret with MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN"""
    hf_secret: Mounted | None = "ptl-hf"
    """Secret with HF_TOKEN, for gated models"""
    cache_claim: Mounted | None = None
    """PVC (ReadWriteMany) for downloads from the hub"""
    ca_config_map: Mounted | None = None
    """ConfigMap whose key ca.crt holds the CA bundle to trust"""

    @model_validator(mode="after")
    def _volumes_have_names_of_their_own(self) -> Storage:
        # the same Secret is one volume
        secrets = {self.s3_secret, self.mlflow_secret, self.hf_secret}
        names = [*secrets, self.config_map, self.ca_config_map, self.cache_claim]
        repeated = [name for name in names if name is not None and names.count(name) > 1]
        # Two volumes of one name: Kubernetes refuses the pod, hours after the run was submitted.
        if repeated:
            raise ValueError(
                f"{repeated[0]!r} names two things of different kinds, and Kubeflow names a volume after what it "
                "holds: rename the ConfigMap, Secret or claim"
            )
        return self
