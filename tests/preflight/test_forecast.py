"""The forecast: sizes from the config alone, the known FLOP rules, and warnings where a run cannot fit."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from ptl.config.dag import nodes
from ptl.config.run import load_config
from ptl.config.schedule import plan
from ptl.errors import InputError
from ptl.model.dimensions import with_experts, with_width
from ptl.preflight import remedies
from ptl.preflight.forecast import devices, forecast, table
from ptl.preflight.forecast_model import GPUS, decode_seconds, forward_flops, shape_of, training_memory
from ptl.units import decimal_hours, duration

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
DENSE = ROOT / "examples/tiny_reasoner/checkpoint"
LLAMA3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}


@pytest.fixture
def large(tmp_path):
    """Only the config of an 8B model: there are no weights to read."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3))
    return tmp_path


def config(model, **changes):
    given = {"model.path": str(model), "schedule.recovery_tokens": 100_000_000, "recover": [{"dtype": "bfloat16"}]}
    given["prune.criterion"] = "max"  # scored in less time than an evaluation takes
    return load_config(TINY, given | changes)


def test_the_shape_is_that_of_the_model():
    shape = shape_of(str(DENSE))
    model = AutoModelForCausalLM.from_pretrained(DENSE)
    assert shape.params == model.num_parameters()
    assert (shape.dimensions.layers, shape.hidden, shape.vocabulary) == (4, 64, model.config.vocab_size)


def test_a_large_model_needs_its_config_only(large):
    shape = shape_of(str(large))
    assert shape.params == 8_030_261_248  # of Llama 3 8B
    assert shape.kv_bytes == 2 * 32 * 8 * 128 * 2 and shape.itemsize == 2
    assert forward_flops(shape, shape.dimensions, 1, 0) == pytest.approx(
        2 * shape.params, rel=0.07
    )  # the embedding is no product


def test_steps_and_tokens_are_those_of_the_plan(large):
    settings = config(large)
    told = forecast(settings)
    names = [step.step for step in told.steps]
    assert names[:4] == ["evaluate-0", "prune-1", "recover-1", "evaluate-1"]
    assert names[-3:] == ["control-prune", "control-recover", "control-evaluate"]
    tokens = [step.tokens for step in told.steps if step.step.startswith("recover")]
    assert tokens == [it.tokens for it in plan(settings.schedule, settings.prune)]
    # Widths are rounded as prune rounds them.
    assert told.steps[-1].params == told.steps[-4].params == pytest.approx(0.6 * told.shape.params, rel=0.01)
    assert told.steps[-1].params <= 0.6 * told.shape.params
    assert told.hours == pytest.approx(sum(step.hours for step in told.steps))
    last = told.steps[-2]
    flops = 6 * (last.params - 128256 * 4096) * 1e8  # of the control's recovery
    assert last.hours == pytest.approx(flops / (0.35 * 989e12) / 3600, rel=0.1)


def warnings(settings, *arguments):
    return remedies.warnings(forecast(settings, *arguments))


def test_what_cannot_fit_is_said_with_a_remedy(large):
    (warning,) = warnings(config(large), "h100", 1)
    assert warning.startswith("recover-1, recover-2, recover-3, recover-4 and control-recover: up to 135 GiB")
    assert warning.endswith(": 2 GPUs with recover.sharding: fsdp, or recover.lora")
    roomy = [{"dtype": "bfloat16", "gradient_checkpointing": True, "sharding": "fsdp", "batch_size": 32}]
    assert warnings(config(large, recover=roomy), "h100", 8) == []
    assert warnings(config(DENSE), "t4") == []


def test_a_model_that_is_too_large_for_a_node_is_sent_to_several(large):
    """Llama 3 8B: 128 GB of weights, gradients and optimizer state, of which each of 8 GPUs has an eighth."""
    sharded = {"dtype": "bfloat16", "gradient_checkpointing": True, "sharding": "fsdp", "batch_size": 16}

    def too_large(nodes):
        said = warnings(config(large, recover=[sharded]), "t4", 8, nodes)
        return [warning for warning in said if warning.startswith("recover") and "GiB" in warning]

    (warning,) = too_large(1)
    assert warning.endswith(": resources.steps.recover.nodes: 2 (of 8 GPUs), or recover.lora")
    assert too_large(2) == []


@pytest.mark.parametrize(
    ("stage", "gpus"),
    [({}, 8), ({"gradient_checkpointing": True, "sharding": "fsdp"}, 8), ({"lora": {"rank": 8}}, 8), ({}, 1)],
    ids=["whole", "sharded", "adapters", "one-gpu"],
)
def test_a_remedy_that_is_applied_fits(large, stage, gpus):
    """Llama 3 70B on H100s: weights alone exceed one of them, so that no smaller batch can help."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    (large / "config.json").write_text(json.dumps(LLAMA3 | sizes))
    stage = {"dtype": "bfloat16"} | stage

    def too_large(kind, changed, evaluate, count, nodes=1):
        said = warnings(config(large, recover=[changed], **evaluate), "h100", count, nodes)
        return [warning for warning in said if warning.startswith(kind) and "GiB on each GPU" in warning]

    (warning,) = too_large("evaluate", stage, {}, gpus)
    vllm = {"evaluate.backend": "vllm", "evaluate.speed.repeats": 0}
    if smaller := re.search(r"evaluate.batch_size: (\d+)", warning):
        vllm["evaluate.batch_size"] = int(smaller[1])
    assert "evaluate.backend: vllm" in warning
    assert too_large("evaluate", stage, vllm, int(re.search(r": (\d) GPUs", warning)[1]) if gpus == 1 else gpus) == []
    (warning,) = too_large("recover", stage, {}, gpus)
    remedies_said = warning.partition("80 GiB: ")[2].split(", or ")
    assert "accumulation" not in warning
    assert "lora" in stage or gpus == 1 or remedies_said[-1].startswith("recover.lora")
    for remedy in remedies_said:
        changed = stage | ({"lora": {"rank": 16}} if "recover.lora" in remedy else {})
        changed |= {"sharding": "fsdp"} if "fsdp" in remedy else {}
        changed |= {"gradient_checkpointing": True} if "checkpointing" in remedy else {}
        nodes = re.search(r"nodes: (\d+) \(of (\d+) GPUs", remedy)
        count, nodes = (int(nodes[2]), int(nodes[1])) if nodes else (gpus, 1)
        assert too_large("recover", changed, {}, count, nodes) == [], remedy


def test_memory_follows_the_settings(large):
    shape = shape_of(str(large))
    plain, bits = config(large).recover[0], 16 * shape.params

    def memory(gpus=1, **changes):
        stage = config(large, recover=[{"dtype": "bfloat16"} | changes]).recover[0]
        return training_memory(shape, shape.dimensions, stage, gpus)

    assert memory() > bits and devices(plain.processes, 4) == 4
    assert memory(gradient_checkpointing=True) < memory()
    assert memory(lora={"rank": 8}) == pytest.approx(memory() - 12 * shape.params)
    gathered = 3 * 128256 * 4096 * 2  # of the embeddings, which are larger than a layer: two weights and a gradient
    assert memory(4, sharding="fsdp") == pytest.approx(memory(4) - 12 * shape.params + gathered)
    assert memory(method="distil") > memory() + 2 * shape.params
    assert memory(method="grpo", beta=0.01) == pytest.approx(memory(method="grpo", beta=0.0) + 4 * shape.params)


def test_pruning_holds_a_layer_on_the_gpu_and_taylors_hidden_states_beside_it(large):
    def first_prune(**changes):
        return next(step for step in forecast(config(large, **changes)).steps if step.step == "prune-1")

    paper, taylor = (first_prune(prune={"criterion": criterion}) for criterion in ("max", "taylor"))
    assert taylor.memory == paper.memory < 2 * shape_of(str(large)).params  # bytes: less than the weights
    assert taylor.note == f"{paper.note}, 8.5 GiB of host memory"
    assert "host" not in first_prune(prune={"target": "layers"}).note  # their scores need no gradients


def test_more_gpus_and_faster_ones_take_less_time(large):
    one, four = (forecast(config(large), "a100-80", count) for count in (1, 4))
    recovery = [step.hours for step in one.steps if "recover" in step.step]
    shared = [step.hours for step in four.steps if "recover" in step.step]
    assert shared == pytest.approx([hours / 4 for hours in recovery])
    assert four.steps[0].hours == pytest.approx(one.steps[0].hours / 4)  # 500 items: 8 batches, or 2 on each GPU
    assert forecast(config(large), "h100", 1).hours < one.hours
    alone = forecast(config(large, **{"evaluate.processes": 1}), "a100-80", 4).steps[0]
    assert (alone.hours, alone.gpus) == (pytest.approx(one.steps[0].hours), 4)  # the other three are held, and idle
    slower = forecast(config(large, recover=[{"dtype": "float32"}]), "a100-80", 1)
    assert slower.hours > one.hours


def test_unknown_sizes_are_told(large):
    task = {"tasks": [{"name": "somebody_elses_task"}]}
    assert "1000 items assumed" in forecast(config(large, evaluate=task)).steps[0].note
    known = {"tasks": [{"name": "gsm8k"}]}
    assert forecast(config(large, evaluate=known)).steps[0].note == ""


def test_errors_name_what_is_wrong(large, tmp_path):
    with pytest.raises(InputError, match="gpu: 'h9000' is not known; it must be one of t4"):
        forecast(config(large), "h9000")
    with pytest.raises(InputError, match="no folder /nowhere"):
        forecast(config("/nowhere"))
    with pytest.raises(InputError, match="no size below the model's own"):
        forecast(config(large, **{"schedule.target": 9e9})).steps  # noqa: B018


def test_the_gpus_are_in_the_order_of_their_memory_and_in_plausible_units():
    assert list(GPUS) == sorted(GPUS, key=lambda name: GPUS[name].gib)
    for gpu in GPUS.values():
        assert gpu.bf16 >= gpu.fp32 > 1 and 0.1 < gpu.bandwidth < 10 and 16 <= gpu.gib < 1024
    assert GPUS["h100"].bf16 / GPUS["a100-80"].bf16 == pytest.approx(3.17, abs=0.01)


@pytest.mark.parametrize("changes", [{}, {"gate.enabled": True}, {"control": False}, {"resources.doctor": True}])
def test_every_step_of_the_dag_that_computes_is_forecast(large, changes):
    settings = config(large, **changes)
    computing = {node.name for node in nodes(settings)} - {"doctor", "import-model", "report"}
    told = forecast(settings)
    assert len(told.steps) == len(computing) and {step.step for step in told.steps} == computing


def test_gpu_hours_are_of_all_gpus_that_a_step_holds(large):
    given = {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 8}
    told = forecast(config(large, **given))
    held = {step.step: step.gpu_hours / step.hours for step in told.steps}
    assert (held["prune-1"], held["recover-1"], held["evaluate-0"]) == pytest.approx((1, 8, 8))
    assert told.gpu_hours == pytest.approx(sum(step.gpu_hours for step in told.steps)) and told.gpu_hours > told.hours
    asked = forecast(config(large, **given, **{"resources.steps": {"prune": {"accelerators": 2}}})).steps[1]
    assert asked.gpus == 2 and asked.hours == pytest.approx(told.steps[1].hours)  # a second GPU is held, and idle


def test_an_evaluation_with_fewer_processes_than_gpus_takes_longer(large):
    given = {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 8, "evaluate.batch_size": 1}
    hours = {
        processes: forecast(config(large, **given, **{"evaluate.processes": processes})).steps[0].hours
        for processes in (None, 2, 8)
    }
    assert hours[2] == pytest.approx(4 * hours[8], rel=0.02) and hours[None] == hours[8]


def test_the_table_fits_into_a_pipe(large):
    told = forecast(config(large, **NODES, recover=[LONG]), num_nodes=4)
    printed = table(told)
    title = f"{duration(3600 * told.hours)} of work, {decimal_hours(told.gpu_hours)} GPU-hours"
    assert "8,030,261,248 parameters on 4 nodes of 8 x h100" in printed and title in " ".join(printed.split())
    (row,) = [line for line in printed.splitlines() if line.startswith("│ recover-1")]
    step = recovery_of(told)
    assert [f"{step.params:,}", f"{step.tokens:,}"] == [cell.strip() for cell in row.split("│")][2:4]
    assert "4 x 8" in row


NODES = {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 8}
LONG = {"dtype": "bfloat16", "gradient_checkpointing": True, "sharding": "fsdp", "max_length": 4096, "batch_size": 64}


def recovery_of(told):
    """The first recovery."""
    return next(step for step in told.steps if step.step == "recover-1")


def test_nodes_come_from_the_config_or_the_command_line(large):
    asked = config(large, **NODES, **{"resources.steps": {"recover": {"nodes": 4}}}, recover=[LONG])
    told = forecast(asked)
    assert (told.nodes, told.gpus["recover"]) == (4, 8)
    held = {step.step: (step.gpus, step.nodes) for step in told.steps}
    assert (held["recover-1"], held["prune-1"], held["evaluate-0"]) == ((8, 4), (1, 1), (8, 1))
    assert recovery_of(told).gpu_hours == pytest.approx(32 * recovery_of(told).hours)
    assert recovery_of(forecast(asked, num_nodes=2)).nodes == 2
    assert recovery_of(forecast(asked, count=4)).gpus == 4
    one, four = (recovery_of(forecast(asked, num_nodes=nodes)) for nodes in (1, 4))
    assert four.hours == pytest.approx(one.hours / 4) and four.gpu_hours == pytest.approx(one.gpu_hours)


# Qwen3-30B-A3B, as its config.json says it
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def mixture(tmp_path):
    """Only the config of a 30B mixture: there are no weights to read."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    return tmp_path


def test_the_published_sizes_of_qwen3_30b_a3b(mixture):
    """30.5 billion parameters, 3.3 billion of them active, say its authors."""
    shape = shape_of(str(mixture))
    assert (shape.params, shape.dimensions.active_params) == (30_532_122_624, 3_353_032_704)
    assert shape.kv_bytes == 48 * 2 * 4 * 128 * 2


def test_flops_and_decoding_follow_the_experts_in_use(mixture):
    shape = shape_of(str(mixture))
    dense = shape.dimensions
    half, narrow = with_experts(dense, 64), with_width(dense, 512)
    flops, fewer, narrower = (forward_flops(shape, model, 1, 0) for model in (dense, half, narrow))
    assert fewer == pytest.approx(flops, rel=0.01) and flops < 2 * 3.4e9 and narrower < 0.81 * fewer
    one, many = (decode_seconds(shape, dense, rows, 2, 0, GPUS["h100"]) for rows in (1, 256))
    assert many == pytest.approx(one * dense.params / dense.active_params, rel=0.01)


def test_each_iteration_counts_its_own_unit(mixture):
    settings = {"model.path": str(mixture), "schedule.target": 0.3}
    steps = {step.step: step for step in forecast(load_config(TINY, settings | {"prune.target": "experts"})).steps}
    assert steps["prune-4"].params == pytest.approx(0.7 * 30_532_122_624, rel=0.02)
    assert steps["prune-1"].note.endswith("of 128 experts")  # reap needs one pass, and keeps no states of every layer
    mixed = {step.step: step for step in forecast(load_config(TINY, settings | {"prune.target": "layers"})).steps}
    # Layers are attention too.
    per_token = [mixed[f"recover-{i}"].hours / mixed[f"recover-{i}"].tokens for i in (1, 2, 3)]
    assert per_token[0] > per_token[1] > per_token[2]
