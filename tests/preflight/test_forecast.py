"""The forecast: sizes from the config alone, the known FLOP rules, and warnings where a run cannot fit."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from ptl.config.cluster import Resources
from ptl.config.dag import Node, Source, nodes
from ptl.config.run import load_config
from ptl.config.schedule import plan
from ptl.errors import InputError
from ptl.preflight.forecast import busiest, forecast
from ptl.preflight.forecast_model import GpuGroup, forward_flops, shape_of, training_memory
from ptl.preflight.forecast_steps import devices
from ptl.preflight.forecast_table import table
from ptl.preflight.gpus import GPUS
from ptl.units import duration

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
    assert (shape.layers, shape.hidden, shape.vocabulary) == (4, 64, model.config.vocab_size)


def test_a_large_model_needs_its_config_only(large):
    shape = shape_of(str(large))
    assert shape.params == 8_030_261_248  # of Llama 3 8B
    assert shape.kv_bytes == 2 * 32 * 8 * 128 * 2 and shape.itemsize == 2
    assert forward_flops(shape, 1, 0) == pytest.approx(2 * shape.params, rel=0.07)  # the embedding is no product


def test_steps_and_tokens_are_those_of_the_plan(large):
    settings = config(large)
    told = forecast(settings)
    names = [step.step for step in told.steps]
    assert names[:4] == ["evaluate-0", "prune-1", "recover-1", "evaluate-1"]
    assert names[-3:] == ["control-prune", "control-recover", "control-evaluate"]
    tokens = [step.tokens for step in told.steps if step.step.startswith("recover")]
    assert tokens == [it.tokens for it in plan(settings.schedule, settings.prune)]
    assert told.steps[-1].params == told.steps[-4].params == pytest.approx(0.6 * told.params, abs=2)
    assert told.hours == pytest.approx(sum(step.hours for step in told.steps))
    last = told.steps[-2]
    assert last.flops == pytest.approx(6 * (last.params - 128256 * 4096) * 1e8, rel=0.1)


def test_what_cannot_fit_is_said_with_a_remedy(large):
    (warning,) = forecast(config(large), "h100", 1).warnings
    assert warning.startswith("recover-1, recover-2, recover-3, recover-4 and control-recover: about 107 to 127 GiB")
    assert warning.endswith(": 2 GPUs with recover.sharding: fsdp, or recover.lora")
    roomy = [{"dtype": "bfloat16", "gradient_checkpointing": True, "sharding": "fsdp", "batch_size": 32}]
    assert forecast(config(large, recover=roomy), "h100", 8).warnings == ()
    assert forecast(config(DENSE), "t4").warnings == ()
    (warning,) = forecast(config(DENSE, export=[{"format": "gguf", "type": "q8_0"}]), "t4").warnings
    assert warning.startswith("the forecast leaves out export-gguf-q8-0: ")


def test_a_model_that_is_too_large_for_a_node_is_sent_to_several(large):
    """Llama 3 8B: 128 GB of weights, gradients and optimizer state, of which each of 8 GPUs has an eighth."""
    sharded = {"dtype": "bfloat16", "gradient_checkpointing": True, "sharding": "fsdp", "batch_size": 16}

    def too_large(nodes, **changes):
        told = forecast(config(large, recover=[sharded | changes]), "t4", 8, nodes)
        return [warning for warning in told.warnings if warning.startswith("recover") and "GiB" in warning]

    (warning,) = too_large(1)
    assert warning.endswith(": resources.steps.recover.nodes: 2 (of 8 GPUs), or recover.lora")
    assert too_large(2) == []


def test_of_changes_that_are_enough_alone_each_is_a_remedy(large):
    adapters = {"dtype": "bfloat16", "lora": {"rank": 8}, "batch_size": 64, "max_length": 512}
    (warning,) = forecast(config(large, recover=[adapters]), "h100", 1).warnings
    assert warning.endswith(": recover.gradient_checkpointing: true, or a larger recover.accumulation")


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
        told = forecast(config(large, recover=[changed], **evaluate), "h100", count, nodes)
        return [warning for warning in told.warnings if warning.startswith(kind) and "GiB on each GPU" in warning]

    (warning,) = too_large("evaluate", stage, {}, gpus)
    vllm = {"evaluate.backend": "vllm", "evaluate.speed.repeats": 0}
    if "smaller evaluate.batch_size" in warning:
        vllm["evaluate.batch_size"] = 1
    assert "evaluate.backend: vllm" in warning
    assert too_large("evaluate", stage, vllm, int(re.search(r": (\d) GPUs", warning)[1]) if gpus == 1 else gpus) == []
    (warning,) = too_large("recover", stage, {}, gpus)
    remedies = warning.partition("80 GiB: ")[2].split(", or ")
    assert remedies and "accumulation" not in warning
    assert "lora" in stage or gpus == 1 or remedies[-1].startswith("recover.lora")
    for remedy in remedies:
        changed = stage | ({"lora": {"rank": 16}} if "recover.lora" in remedy else {})
        changed |= {"sharding": "fsdp"} if "fsdp" in remedy else {}
        nodes = re.search(r"nodes: (\d+) \(of (\d+) GPUs", remedy)
        count, nodes = (int(nodes[2]), int(nodes[1])) if nodes else (gpus, 1)
        assert too_large("recover", changed, {}, count, nodes) == [], remedy


def test_settings_that_would_waste_the_run_are_said_as_well():
    (warning,) = forecast(config(DENSE, **{"gate.enabled": True}, recover=[{"decay": 0.3}])).warnings[1:]
    assert warning.startswith("recover.decay=0.3")


def test_memory_follows_the_settings(large):
    shape = shape_of(str(large))
    plain, bits = config(large).recover[0], 16 * shape.params

    def memory(count=1, nodes=1, **changes):
        stage = config(large, recover=[{"dtype": "bfloat16"} | changes]).recover[0]
        return training_memory(shape, stage, shape, GpuGroup(count, nodes))

    assert memory() > bits and devices(plain.processes, 4) == 4
    assert memory(gradient_checkpointing=True) < memory()
    assert memory(lora={"rank": 8}) == pytest.approx(memory() - 12 * shape.params)
    gathered = 3 * 128256 * 4096 * 2  # of the embeddings, which are larger than a layer: two weights and a gradient
    assert memory(4, sharding="fsdp") == pytest.approx(memory(4) - 12 * shape.params + gathered)
    # Two nodes of four hold as much as one of eight.
    assert memory(4, 2, sharding="fsdp") == memory(8, sharding="fsdp")
    assert memory(method="distil") > memory() + 2 * shape.params
    assert memory(method="grpo", beta=0.01) == pytest.approx(memory(method="grpo", beta=0.0) + 4 * shape.params)


def test_pruning_holds_a_layer_on_the_gpu_and_taylors_hidden_states_beside_it(large):
    def first_prune(**changes):
        return next(step for step in forecast(config(large, **changes)).steps if step.step == "prune-1")

    paper, taylor = (first_prune(prune={"criterion": criterion}) for criterion in ("max", "taylor"))
    assert taylor.memory == paper.memory < 2 * shape_of(str(large)).params  # bytes: less than the weights
    assert (paper.host_memory, paper.note) == (0, "")
    assert taylor.host_memory == (32 + 2) * 128 * 256 * 4096 * 2 and taylor.note == "8.5 GiB of host memory"
    assert first_prune(prune={"target": "layers"}).host_memory == 0  # their scores need no gradients
    answering = first_prune(**{"calibration.answers": "self"})
    assert answering.memory > 2 * shape_of(str(large)).params


def test_pods_with_too_little_memory_for_the_hidden_states_are_warned_of(large):
    def warnings(**resources):
        settings = config(large, prune={}, recover=[{"lora": {"rank": 8}, "dtype": "bfloat16", "batch_size": 1}])
        asked = settings.model_copy(update={"resources": Resources(**resources)})
        return [warning for warning in forecast(asked).warnings if "host memory" in warning]

    (warning,) = warnings(memory="8Gi")
    assert warning.startswith("prune-1: about 8.5 GiB") and "resources.memory=8Gi: raise it" in warning
    (warning,) = warnings(memory="64Gi", steps={"prune": {"memory": "9G"}})
    assert "resources.steps.prune.memory=9G" in warning
    assert warnings() == warnings(memory="9Gi") == []


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
    with pytest.raises(InputError, match="would remove"):
        forecast(config(large, **{"schedule.target": 9e9}))


def test_the_gpus_are_in_the_order_of_their_memory_and_in_plausible_units():
    assert list(GPUS) == sorted(GPUS, key=lambda name: GPUS[name].memory)
    for gpu in GPUS.values():
        assert gpu.bf16 >= gpu.fp32 > 1e12 and 1e11 < gpu.bandwidth < 1e13 and 16 << 30 <= gpu.memory < 1 << 40
        assert 1e9 < gpu.network < gpu.link < gpu.bandwidth
    assert GPUS["h100"].bf16 / GPUS["a100-80"].bf16 == pytest.approx(3.17, abs=0.01)


@pytest.mark.parametrize("changes", [{}, {"gate.enabled": True}, {"control": False}, {"resources.doctor": True}])
def test_every_step_of_the_dag_that_computes_is_forecast(large, changes):
    settings = config(large, **changes)
    computing = {node.name for node in nodes(settings)} - {"doctor", "import-model", "report"}
    told = forecast(settings)
    assert len(told.steps) == len(computing) and {step.step for step in told.steps} == computing


def hours_of(told):
    """Hours by step, and the sum of those named."""
    hours = {step.step: step.hours for step in told.steps}
    return hours, lambda *names: sum(hours[name] for name in names)


def test_with_the_gate_off_only_the_last_evaluation_is_waited_for(large):
    told = forecast(config(large), "h100", 1)
    hours, total = hours_of(told)
    trained = [f"{stage}-{i}" for i in (2, 3, 4) for stage in ("prune", "recover")]
    path = ("prune-1", "recover-1", *trained, "evaluate-4")
    assert told.critical_hours == pytest.approx(total(*path))
    assert told.critical_steps == ("import-model", *path)
    assert told.hours == pytest.approx(sum(hours.values())) and told.critical_hours < 0.6 * told.hours


def test_with_the_gate_each_iteration_waits_for_its_verdict(large):
    told = forecast(config(large, **{"gate.enabled": True}), "h100", 1)
    hours, total = hours_of(told)
    arm = [f"{stage}-{i}" for i in (1, 2, 3, 4) for stage in ("prune", "recover", "evaluate")]
    assert hours["evaluate-0"] < total("prune-1", "recover-1")  # beside which the dense model is scored
    assert told.critical_hours == pytest.approx(total(*arm))
    assert told.critical_steps == ("import-model", *arm)


def test_an_equal_control_beside_the_loop_costs_gpus_and_no_time(large):
    """With one iteration both arms are the same work."""
    once = {"schedule.iterations": 1}
    told, without = (forecast(config(large, control=control, **once), "h100", 8) for control in (True, False))
    assert told.critical_hours == pytest.approx(without.critical_hours)
    assert told.hours > 1.5 * without.hours and told.busiest_gpus > without.busiest_gpus


def test_a_control_after_the_loop_adds_its_hours(large):
    changes = {"gate.enabled": True, "resources.control": "after"}
    told = forecast(config(large, **changes), "h100", 8)
    hours, _ = hours_of(told)
    assert told.critical_hours == pytest.approx(told.hours - hours["evaluate-0"])  # the rest is in turn
    assert told.busiest == ("evaluate-0", "prune-1")
    assert told.critical_steps[-3:] == ("control-prune", "control-recover", "control-evaluate")


def test_the_busiest_moment_by_hand():
    """a 0-2, b 0-1, c 1-3 (after b), d 2-4 (after a): a and b, then a and c, then c and d."""
    dag = [Node("a", {}), Node("b", {}), Node("c", {"in": Source("b", "out")}), Node("d", {}, ("a",))]
    hours = {"a": 2.0, "b": 1.0, "c": 2.0, "d": 2.0}
    assert busiest(dag, hours, dict.fromkeys(hours, 1)) == ("a", "b")  # the first of three
    assert busiest(dag, hours, {"a": 1, "b": 1, "c": 1, "d": 4}) == ("c", "d")
    assert busiest(dag, hours, {"a": 4, "b": 1, "c": 2, "d": 1}) == ("a", "c")
    in_turn = [Node("a", {}), Node("b", {}, ("a",))]
    assert busiest(in_turn, {"a": 1.0, "b": 1.0}, {"a": 1, "b": 1}) == ("a",)
    assert busiest(in_turn, {"a": 1.0, "b": 1.0}, {"a": 0, "b": 0}) == ("a",)  # the table names its last step
    assert busiest(in_turn, {}, {}) == ()


def test_gpus_at_the_same_time_follow_the_config_and_the_command_line(large):
    given = {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 1, "control": False}
    four = {"resources.steps": {"recover": {"accelerators": 4}}}
    assert forecast(config(large, **given)).busiest_gpus == 2
    told = forecast(config(large, **given, **four))
    assert told.count == 4 and told.busiest_gpus == 5  # a recovery, and an evaluation that ends meanwhile
    assert [name.partition("-")[0] for name in told.busiest] == ["evaluate", "recover"]
    # The command line replaces `accelerators`, not what a kind of step has of its own.
    doubled = forecast(config(large, **given, **four), count=2)
    assert [step.gpus for step in doubled.steps[:3]] == [2, 1, 4]  # evaluate-0, prune-1, recover-1
    assert forecast(config(large)).busiest_gpus == 3  # without accelerators: one for each step


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


def test_the_table_gives_both_times_and_marks_the_path(large):
    told = forecast(config(large, **{"gate.enabled": True, "schedule.recovery_tokens": 10**9}), "h100", 8)
    console = Console(width=200, file=io.StringIO())
    console.print(table(told))
    printed = console.file.getvalue()
    work, wall_clock = duration(3600 * told.hours), duration(3600 * told.critical_hours)
    total = f"{told.gpu_hours:.2f}"
    assert " h " in work and f"{work} of work ({total} GPU-hours), {wall_clock} from start to end" in printed
    marked = {line.split()[1] for line in printed.splitlines() if line.startswith("│") and line.split()[2] == "*"}
    assert next(line for line in printed.splitlines() if "all steps" in line).split("│")[-3].strip() == total
    assert marked == set(told.critical_steps) - {"import-model"}
    assert "holds 16 GPUs: recover-1 and control-recover at the same time" in " ".join(printed.split())


def test_short_runs_are_not_0_hours():
    title = table(forecast(config(DENSE))).title
    assert " s of work" in title and " 0.0 s" not in title


NODES = {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 8}
LONG = {"dtype": "bfloat16", "gradient_checkpointing": True, "sharding": "fsdp", "max_length": 4096, "batch_size": 64}


def recovery_of(told):
    """The first recovery."""
    return next(step for step in told.steps if step.step == "recover-1")


def test_nodes_come_from_the_config_or_the_command_line(large):
    asked = config(large, **NODES, **{"resources.steps": {"recover": {"nodes": 4}}}, recover=[LONG])
    told = forecast(asked)
    assert (told.nodes, told.count) == (4, 8) and table(told).title.startswith(
        "8,030,261,248 parameters on 4 nodes of 8"
    )
    held = {step.step: (step.gpus, step.nodes) for step in told.steps}
    assert (held["recover-1"], held["prune-1"], held["evaluate-0"]) == ((32, 4), (1, 1), (8, 1))
    assert recovery_of(told).gpu_hours == pytest.approx(32 * recovery_of(told).hours)
    assert recovery_of(forecast(asked, num_nodes=2)).gpus == 16
    assert recovery_of(forecast(asked, count=4)).gpus == 16  # on each of the four nodes


def test_where_nothing_is_waited_for_nodes_divide_the_time_and_not_the_gpu_hours(large):
    settings = config(large, **NODES, recover=[LONG])
    one, four = (recovery_of(forecast(settings, num_nodes=nodes)) for nodes in (1, 4))
    assert one.waiting == four.waiting == 0 and one.note == ""
    assert four.hours == pytest.approx(one.hours / 4) and four.gpu_hours == pytest.approx(one.gpu_hours)
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
    assert one.tokens_per_second == pytest.approx(one.tokens / one.hours / 3600)


def test_a_batch_that_nodes_cannot_divide_is_said_before_it_fails(large):
    settings = config(large, **NODES, recover=[LONG | {"accumulation": 2}])
    (warning,) = forecast(settings, num_nodes=16).warnings
    assert "recover.batch_size=64 is no multiple of accumulation=2 times the 128 training processes" in warning
    assert warning.endswith("set recover.batch_size=256")
    assert forecast(settings, num_nodes=4).warnings == ()


def test_the_table_has_nodes_and_tokens_a_second_and_fits_into_a_pipe(large):
    told = forecast(config(large, **NODES, recover=[LONG]), num_nodes=4, network=12.5)
    console = Console(width=120, file=io.StringIO())
    console.print(table(told))
    (row,) = [line for line in console.file.getvalue().splitlines() if line.startswith("│ recover-1")]
    cells = [cell.strip() for cell in row.split("│")]
    step = recovery_of(told)
    assert cells[2:4] == [f"{step.params:,}", f"{step.tokens:,}"] and "4 x 8" in cells
    assert f"{step.tokens_per_second:,.0f}" in cells
