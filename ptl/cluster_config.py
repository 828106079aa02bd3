"""What a config says about the cluster: resources of the steps, and where addresses and credentials come from.

Addresses and credentials are never in the config, so never in the compiled YAML: they come from a ConfigMap and from
Secrets of the cluster, all optional. A step names what it misses; runners on one machine ignore all of this.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ptl.retries import RETRIES, RETRY_WAIT
from ptl.section import Section

StepName = Literal["import-model", "prune", "recover", "evaluate", "report"]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
# Kubeflow names a volume after what it holds, and a volume's name is a DNS label.
Mounted = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]

# Volumes that Kubeflow, Argo and `resources.shm` put into every step's pod.
RESERVED = {
    *("shm", "kfp-launcher", "kfp-workspace", "custom-ca", "gcs-scratch", "s3-scratch", "minio-scratch"),
    *("dot-local-scratch", "dot-cache-scratch", "dot-config-scratch"),
    *("var-run-argo", "tmp-dir-argo", "argo-env-config", "argo-staging"),
}
START = 300  # seconds of a timeout that are left to the start of a pod: its image, volumes and inputs
WITHOUT_TIMEOUT = 30 * 24 * 60 * 60  # seconds: Argo needs a number, and takes one hour where it is given none


class Toleration(Section):
    """A taint of nodes that a step may run on."""

    key: str = Field(min_length=1, description="for example nvidia.com/gpu")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="`Equal`: only a taint with this `value`")
    value: str | None = Field(None, description="only with operator Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="none: all effects")

    @model_validator(mode="after")
    def _value_belongs_to_equal(self) -> Toleration:
        if (self.value is not None) != (self.operator == "Equal"):
            raise ValueError("operator Equal needs a value, operator Exists takes none")
        return self


class StepResources(Section):
    """What one kind of step asks for instead; a field that is left out is as for all steps."""

    accelerators: int | None = Field(None, ge=0, description="accelerators of the step")
    cpu: Quantity | None = Field(None, description="CPU cores")
    memory: Quantity | None = Field(None, description="for example 64Gi")
    shm: Quantity | None = Field(None, description="size of /dev/shm; it counts as memory")
    timeout: int | None = Field(None, ge=1, description="seconds")


class Resources(Section):
    """What a step asks of the cluster; runners on one machine heed `timeout`, `retries` and `retry_wait` alone."""

    accelerator: str | None = Field(None, description="for example nvidia.com/gpu")
    accelerators: int = Field(0, ge=0, description="accelerators per prune, recover and evaluate step")
    cpu: Quantity | None = Field(None, description="CPU cores, for example 8")
    memory: Quantity | None = Field(None, description="for example 64Gi")
    shm: Quantity | None = Field(
        None, description="size of /dev/shm of prune, recover and evaluate; it counts as memory"
    )
    timeout: int | None = Field(
        None,
        ge=1,
        description="wall-clock seconds that each attempt of a step may take, its pod's start included: up to 5 "
        "minutes of it, at most a quarter, are left to that",
    )
    retries: int | None = Field(
        None,
        ge=0,
        le=10,
        description="further attempts of a step that failed, in its pod or in another one; finished work is not "
        "redone, and an input error is never tried again. None: 2 on a cluster, 0 on one machine",
    )
    retry_wait: int = Field(
        RETRY_WAIT,
        ge=1,
        description="seconds before the first further attempt, doubled each time; by default 1 on one machine",
    )
    control: Literal["beside", "after"] = Field(
        "beside",
        description="when the control arm runs: `beside` the loop, or `after` it, for a cluster with one accelerator",
    )
    tolerations: tuple[Toleration, ...] = Field((), description="of prune, recover and evaluate")
    node_selector: dict[str, str] = Field(
        {}, description="labels of the nodes for prune, recover and evaluate, for example nvidia.com/gpu.product"
    )
    queue: str | None = Field(None, pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$", description="Kueue LocalQueue")
    image_pull_secrets: tuple[Name, ...] = Field((), description="Secrets with the registry's login")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="`Never`: the nodes hold the images already; none: Kubernetes' default"
    )
    kfp: Literal["2.14", "2.15", "2.16", "2.17"] = Field(
        "2.17",
        description="oldest KFP backend that must take the YAML; it refuses fields that it does not know. Below 2.16 "
        "there is no security context",
    )
    run_as_user: int = Field(1000, ge=1, description="with KFP 2.16 and newer; non-root")
    run_as_group: int = Field(0, ge=0, description="the images are made for group 0, which has no privileges by itself")
    doctor: bool = Field(False, description="begin with a step that tries out MLflow, the store and the accelerators")
    steps: dict[StepName, StepResources] = Field({}, description="other values for one kind of step")

    @property
    def kfp_release(self) -> tuple[int, int]:
        """`kfp` as numbers, to compare."""
        major, minor = self.kfp.split(".")
        return int(major), int(minor)

    @property
    def attempts(self) -> int:
        """Attempts of a step on a cluster, the first one included."""
        return 1 + (RETRIES if self.retries is None else self.retries)

    def of_step(self, stage: str) -> StepResources:
        """What `steps` says of a kind of step; nothing for one that it does not name."""
        return next((own for name, own in self.steps.items() if name == stage), StepResources())

    def timeout_of(self, stage: str) -> int | None:
        """Wall-clock seconds that one attempt of a kind of step may take; None: no limit."""
        own = self.of_step(stage).timeout
        return self.timeout if own is None else own

    def work_timeout(self, stage: str) -> int | None:
        """The seconds of a timeout that an attempt's work may take.

        A pod's deadline counts from before its image is pulled, and kills without a word: the work must end before it.
        """
        timeout = self.timeout_of(stage)
        return None if timeout is None else timeout - min(START, timeout // 4)

    def window(self, stage: str) -> int:
        """Wall-clock seconds within which all attempts of a kind of step end, the pauses between them included."""
        timeout = self.timeout_of(stage)
        pauses = self.retry_wait * (2 ** (self.attempts - 1) - 1)
        return WITHOUT_TIMEOUT if timeout is None else self.attempts * timeout + pauses

    @model_validator(mode="after")
    def _accelerators_have_a_name(self) -> Resources:
        wanted = [self.accelerators, *(step.accelerators for step in self.steps.values())]
        if any(wanted) and not self.accelerator:
            raise ValueError("accelerators without accelerator: name the resource, for example nvidia.com/gpu")
        return self


class Storage(Section):
    """Where runs are tracked; the checkpoints are stored under the experiment's artifact location."""

    experiment: str = Field("ptl", min_length=1, description="MLflow experiment")
    registered_model: str | None = Field(
        None,
        min_length=1,
        max_length=250,
        description="MLflow registry name, without / : and quotes; none: the config's name",
    )
    config_map: Mounted | None = Field("ptl", description="ConfigMap with MLFLOW_TRACKING_URI and any other variable")
    s3_secret: Mounted | None = Field("ptl-s3", description="Secret with the S3 keys; not needed with a cloud identity")
    s3_access_key: str = Field("AWS_ACCESS_KEY_ID", description="key of the Secret; KFP's own Secret has `accesskey`")
    s3_secret_key: str = Field("AWS_SECRET_ACCESS_KEY", description="key of the Secret; KFP's own has `secretkey`")
    mlflow_secret: Mounted | None = Field(
        "ptl-mlflow", description="Secret with MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN"
    )
    hf_secret: Mounted | None = Field("ptl-hf", description="Secret with HF_TOKEN, for gated models")
    cache_claim: Mounted | None = Field(None, description="PVC (ReadWriteMany) for downloads from the hub")
    ca_config_map: Mounted | None = Field(None, description="ConfigMap whose key ca.crt holds the CA bundle to trust")

    @model_validator(mode="after")
    def _volumes_have_names_of_their_own(self) -> Storage:
        kinds = {
            "secret": {self.s3_secret, self.mlflow_secret, self.hf_secret},
            "ConfigMap": {self.config_map},
            "CA bundle": {self.ca_config_map},
            "claim": {self.cache_claim},
        }
        names = [name for held in kinds.values() for name in held if name is not None]
        reserved = sorted(RESERVED & set(names))
        if reserved:
            raise ValueError(
                f"{reserved[0]!r} is the name of a volume that each step's pod has already: choose another"
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{twice[0]!r} names two things of different kinds, and Kubeflow names a volume after what it holds: "
                "rename the ConfigMap, Secret or claim"
            )
        return self

    @field_validator("registered_model")
    @classmethod
    def _name_that_mlflow_takes(cls, name: str | None) -> str | None:
        if name and set(name) & set("/:'\"`"):
            raise ValueError("has a character that a name in MLflow's registry cannot have (/ : or a quote); remove it")
        return name
