"""What a config says about the cluster: resources of the steps, and where addresses and credentials come from.

Addresses and credentials are never in the config, so never in the compiled YAML: they come from a ConfigMap and from
Secrets of the cluster, all optional. A step names what it misses; runners on one machine ignore all of this.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ptl.section import Section

StepName = Literal["import-model", "prune", "recover", "evaluate", "report"]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]


class Toleration(Section):
    """A taint of nodes that a step may run on."""

    key: str = Field(min_length=1, description="for example nvidia.com/gpu")
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = Field(None, description="only with operator Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="none: all effects")

    @model_validator(mode="after")
    def _value_belongs_to_equal(self) -> Toleration:
        if (self.value is not None) != (self.operator == "Equal"):
            raise ValueError("operator Equal needs a value, operator Exists takes none")
        return self


class StepResources(Section):
    """What one kind of step asks for instead; a field that is left out is as for all steps."""

    accelerators: int | None = Field(None, ge=0)
    cpu: Quantity | None = None
    memory: Quantity | None = None
    shm: Quantity | None = None
    timeout: int | None = Field(None, ge=1, description="seconds")


class Resources(Section):
    """What a step asks of the cluster; local runners ignore it."""

    accelerator: str | None = Field(None, description="for example nvidia.com/gpu")
    accelerators: int = Field(0, ge=0, description="accelerators per prune, recover and evaluate step")
    cpu: Quantity | None = Field(None, description="CPU cores, for example 8")
    memory: Quantity | None = Field(None, description="for example 64Gi")
    shm: Quantity | None = Field(
        None, description="size of /dev/shm of prune, recover and evaluate; it counts as memory"
    )
    timeout: int | None = Field(None, ge=1, description="seconds after which a step's pod is ended")
    retries: int = Field(0, ge=0, le=10, description="further attempts of a failed step; finished work is not redone")
    retry_wait: int = Field(60, ge=1, description="seconds before the first further attempt; doubled each time")
    retry_wait_max: int = Field(900, ge=1, description="seconds")
    tolerations: tuple[Toleration, ...] = Field((), description="of prune, recover and evaluate")
    node_selector: dict[str, str] = Field(
        {}, description="labels of the nodes for prune, recover and evaluate, for example nvidia.com/gpu.product"
    )
    queue: str | None = Field(None, pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$", description="Kueue LocalQueue")
    image_pull_secrets: tuple[Name, ...] = ()
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    kfp: Literal["2.14", "2.15", "2.16"] = Field(
        "2.16",
        description="oldest KFP backend that must take the YAML; it refuses fields that it does not know. Below 2.16 "
        "there is no security context; on 2.14 every Secret and key must exist",
    )
    run_as_user: int = Field(1000, ge=1, description="with KFP 2.16; non-root")
    run_as_group: int = Field(0, ge=0, description="the images are made for group 0, which has no privileges by itself")
    doctor: bool = Field(False, description="begin with a step that tries out MLflow, the store and the accelerators")
    steps: dict[StepName, StepResources] = Field({}, description="other values for one kind of step")

    @model_validator(mode="after")
    def _accelerators_have_a_name(self) -> Resources:
        wanted = [self.accelerators, *(step.accelerators for step in self.steps.values())]
        if any(wanted) and not self.accelerator:
            raise ValueError("accelerators without accelerator: name the resource, for example nvidia.com/gpu")
        return self


class Storage(Section):
    """Where runs are tracked; the checkpoints lie under the experiment's artifact location."""

    experiment: str = Field("ptl", min_length=1, description="MLflow experiment")
    registered_model: str | None = Field(None, description="MLflow registry name; none: the config's name")
    config_map: Name | None = Field("ptl", description="ConfigMap with MLFLOW_TRACKING_URI and other addresses")
    s3_secret: Name | None = Field("ptl-s3", description="Secret with the S3 keys; not needed with a cloud identity")
    s3_access_key: str = Field("AWS_ACCESS_KEY_ID", description="key of the Secret; KFP's own Secret has `accesskey`")
    s3_secret_key: str = Field("AWS_SECRET_ACCESS_KEY", description="key of the Secret; KFP's own has `secretkey`")
    mlflow_secret: Name | None = Field("ptl-mlflow", description="Secret with MLFLOW_TRACKING_USERNAME and _PASSWORD")
    hf_secret: Name | None = Field("ptl-hf", description="Secret with HF_TOKEN, for gated models")
    cache_claim: Name | None = Field(None, description="PVC (ReadWriteMany) for downloads from the hub")
    ca_config_map: Name | None = Field(None, description="ConfigMap whose key ca.crt holds the CA bundle to trust")
