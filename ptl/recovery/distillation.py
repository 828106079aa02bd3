"""Recovery by distillation: the student matches the original model's distribution on the answer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss

from ptl.config.recover import RecoverStage
from ptl.data.sequences import IGNORED
from ptl.errors import InputError
from ptl.model import hub, pretrained
from ptl.recovery import sft
from ptl.recovery.job import RecoverReport, RecoveryJob

TEACHER = "recover.teacher"  # the field of the config, for errors


def distil(src: Path, dst: Path, settings: RecoverStage, job: RecoveryJob) -> RecoverReport:
    """Forward KL to the teacher mixed with the next-token loss, on the same tokens and batches as `cpt`.

    Memory besides cpt's: the teacher's weights in its stored dtype, and the logits of both models at the positions that
    carry loss, float32 [N, V] each. trl's DistillationTrainer has no next-token loss to mix in, and takes prompts, not
    tokenized sequences of an exact total; so the loss is our own.
    """
    teacher = load_teacher(settings, job)
    return sft.train(src, dst, settings, job, _trainer(settings, teacher))


def load_teacher(settings: RecoverStage, job: RecoveryJob) -> Any:
    """The teacher in its stored dtype."""
    folder = job.teacher
    if settings.teacher:
        folder = hub.locate(settings.teacher, None, field=TEACHER)
    if folder is None:
        raise InputError(
            "the run has no original model to learn from",
            field=TEACHER,
            remedy="give a folder or a hub id",
        )
    teacher = pretrained.causal_lm(folder, field=TEACHER)
    return teacher.eval().requires_grad_(False)


def ce_and_kl(
    student: torch.Tensor,  # [N, V]
    teacher: torch.Tensor,  # [N, V], of another V where the embeddings are padded
    labels: torch.Tensor,  # [N]
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over N positions of the next-token loss and of T^2 KL(teacher || student) at temperature T.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """
    # embeddings may be padded to different multiples: the tokens that both have
    vocabulary = min(student.shape[-1], teacher.shape[-1])
    student = student[:, :vocabulary].float()  # [N, V]
    teacher = teacher[:, :vocabulary].float()  # [N, V]
    log_p, log_q = log_softmax(teacher, -1), log_softmax(student, -1)  # [N, V]
    ce = nll_loss(log_q, labels, reduction="sum")
    # a softmax over a large vocabulary costs gigabytes of a GPU, and much of a CPU's step
    if temperature != 1.0:
        log_p, log_q = (log_softmax(each / temperature, -1) for each in (log_p, log_q))
    kl = kl_div(log_q, log_p, reduction="sum", log_target=True)
    return ce, kl * temperature**2


def _trainer(settings: RecoverStage, teacher: Any) -> Any:
    from trl import SFTTrainer

    class DistilTrainer(SFTTrainer):  # type: ignore[misc,unused-ignore]
        """SFTTrainer with another loss; data, batches, logging and checkpoints are the same."""

        def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            # without labels, so that neither model computes a loss
            model_inputs = dict(inputs, use_cache=False)
            labels = model_inputs.pop("labels")[:, 1:]  # [B, T-1]
            has_label = labels != IGNORED  # [B, T-1]
            # prompts come first: of what all rows begin with without a label, no logits
            first = int(has_label.any(0).int().argmax()) if has_label.any() else 0
            has_label, labels = has_label[:, first:], labels[:, first:]  # [B, T-1-first]
            model_inputs["logits_to_keep"] = has_label.shape[1] + 1
            student = model(**model_inputs)
            student_logits = student.logits[:, :-1][has_label]  # [N, V]
            # the Trainer moves the student only
            teacher.to(labels.device)
            with torch.no_grad():
                teacher_logits = teacher(**model_inputs).logits[:, :-1][has_label]  # [N, V]
            ce, kl = ce_and_kl(
                student_logits, teacher_logits, labels[has_label], settings.temperature
            )
            loss = settings.mix * ce + (1 - settings.mix) * kl
            # a batch of one token has no label
            count = has_label.sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss / torch.as_tensor(count).clamp(min=1)
            if num_items_in_batch is not None:
                # counted over all processes, whose gradients are averaged
                loss = loss * self.accelerator.num_processes
            # the routers' loss in a mixture of experts: the mean over micro-batches, as in trl's own loss
            if self.aux_loss_enabled:
                micro_batches = (
                    1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
                )
                loss = loss + self.router_aux_loss_coef * student.aux_loss / micro_batches
            return loss

    return DistilTrainer
