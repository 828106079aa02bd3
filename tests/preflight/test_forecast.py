"""The forecast: sizes from the config alone, the known FLOP rules, and warnings where a run cannot fit."""

import json
from itertools import pairwise

import pytest
from bodies import PUBLISHED, body
from checkout import CONFIGS, SHIPPED, TINY

from ptl.config.dag import nodes
from ptl.config.recover import RecoverStage
from ptl.config.run import load_config
from ptl.config.schedule import plan
from ptl.preflight import forecast_model, remedies
from ptl.preflight.forecast import devices, forecast
from ptl.preflight.forecast_model import (
    CONTEXT,
    GPUS,
    Shape,
    decode_seconds,
    forward_flops,
    shape_of,
)


@pytest.fixture
def large(tmp_path):
    """Only the config of an 8B model: there are no weights to read."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["llama3_8b"]))
    return tmp_path


def config(model, **changes):
    given = {
        "model.path": str(model),
        "schedule.recovery_tokens": 100_000_000,
        "recover": [{"dtype": "bfloat16"}],
    }
    given["prune.criterion"] = "max"  # scored in less time than an evaluation takes
    return load_config(TINY, given | changes)


def test_a_large_model_needs_its_config_only(large):
    shape = shape_of(str(large))
    assert shape.params == 8_030_261_248  # of Llama 3 8B
    assert shape.kv_bytes == 2 * 32 * 8 * 128 * 2 and shape.itemsize == 2
    # The input embedding is no product.
    assert forward_flops(shape, shape.dimensions, 1, 0) == 2 * (shape.params - 128256 * 4096)


# A model whose numbers can be counted by hand; a token has 48 bytes of cache.
SIZES = {
    "params": 1000,
    "layers": 2,
    "width": 10,
    "hidden": 8,
    "params_per_neuron": 20,
    "params_per_layer": 300,
}
BODY = body(**SIZES)
SMALL = Shape(
    BODY, vocabulary=50, lookup=100, heads_width=6, cached_numbers=24, itemsize=2, context=64
)


def test_flops_and_bytes_of_decoding_are_counted():
    assert forward_flops(SMALL, BODY, 10, 4) == 10 * (2 * 900 + 2 * 2 * 6 * 4)
    h100 = 3.35e12 / 2  # bytes a second
    assert decode_seconds(SMALL, BODY, 3, 4, 10, GPUS["h100"]) == pytest.approx(
        (1000 * 4 + 3 * 10 * 48) / h100
    )
    # Of ten experts each token meets two: three rows leave 0.8^3 of them alone.
    mixed = body(**SIZES, experts=10, experts_per_token=2, params_per_expert=50)
    read = 1000 - 0.8**3 * 500
    assert decode_seconds(SMALL, mixed, 3, 2, 0, GPUS["h100"]) == pytest.approx(read * 2 / h100)


# Bytes of a model of 700 parameters on each of four GPUs, besides CUDA's; of a step each has two rows of 32 tokens.
LAYER, LOGITS = 17 * 4 * 8 * 64, 4 * 64 * 50
TRAININGS = (
    ({}, 16 * 700 + 2 * LAYER + 2 * LOGITS),
    ({"dtype": "bfloat16"}, 16 * 700 + LAYER + 2 * LOGITS),
    ({"lora": {}}, 4 * 700 + 2 * LAYER + 2 * LOGITS),
    # embeddings are the largest
    ({"sharding": "fsdp"}, 4 * 700 + 3 * 50 * 8 * 4 + 2 * LAYER + 2 * LOGITS),
    ({"gradient_checkpointing": True}, 16 * 700 + 2 * 4 * 8 * 64 + LAYER + 2 * LOGITS),
    ({"method": "distil"}, 16 * 700 + 2 * LAYER + 3 * LOGITS + 2 * 1000),
    ({"batch_size": 9}, 16 * 700 + 2 * LAYER + 2 * LOGITS),
)


def test_memory_of_training_answers_and_scores_and_checkpoints_are_counted():
    model = body(**SIZES | {"params": 700, "params_per_layer": 200})
    for fields, expected in TRAININGS:
        stage = RecoverStage.model_validate(
            {"batch_size": 16, "accumulation": 2, "max_length": 32} | fields
        )
        assert forecast_model.training_memory(SMALL, model, stage, 4) == CONTEXT + expected, fields
    grpo = RecoverStage(
        method="grpo", batch_size=8, num_generations=2, max_completion_length=8, beta=0
    )
    tokens = 2 * (512 + 8)  # a GPU has two rows
    expected = 16 * 1000 + 2 * 17 * 4 * 8 * tokens + 2 * 4 * tokens * 50 + 48 * tokens
    assert forecast_model.training_memory(SMALL, BODY, grpo, 4) == CONTEXT + expected
    reference = grpo.model_copy(update={"beta": 0.1})
    assert (
        forecast_model.training_memory(SMALL, BODY, reference, 4) == CONTEXT + expected + 4 * 1000
    )
    # On one GPU nothing is sharded.
    alone, sharded = RecoverStage(max_length=32), RecoverStage(max_length=32, sharding="fsdp")
    assert (
        len({forecast_model.training_memory(SMALL, BODY, stage, 1) for stage in (alone, sharded)})
        == 1
    )
    tasks = [{"name": "gsm8k", "max_new_tokens": 88}, {"name": "mbpp", "max_new_tokens": 8}]
    settings = load_config(TINY, {"evaluate.batch_size": 4, "evaluate.tasks": tasks})
    held = 2 * 1000 + 4 * 600 * 48
    assert forecast_model.answering_memory(SMALL, BODY, settings, 4) == CONTEXT + held
    thoughts = load_config(
        TINY, {"evaluate.batch_size": 4, "evaluate.tasks": [*tasks, {"name": "aime24"}]}
    )
    as_its_yaml = 2 * 1000 + 4 * (512 + 32768) * 48
    assert forecast_model.answering_memory(SMALL, BODY, thoughts, 4) == CONTEXT + as_its_yaml
    own = load_config(
        TINY, {"evaluate.batch_size": 4, "training.answers": "self", "training.max_new_tokens": 488}
    )
    assert (
        forecast_model.answering_memory(SMALL, BODY, own, 4) == CONTEXT + 2 * 1000 + 4 * 1000 * 48
    )
    divided = settings.model_copy(
        update={"evaluate": settings.evaluate.model_copy(update={"backend": "vllm"})}
    )
    assert forecast_model.answering_memory(SMALL, BODY, divided, 4) == CONTEXT + held / 4
    # Embeddings and head, all hidden states, and the larger of a batch and the logits of a sequence.
    calibration = settings.calibration.model_copy(
        update={"num_sequences": 4, "max_length": 32, "batch_size": 2}
    )
    held = 400 * 2 + 4 * 32 * 8 * 2
    assert forecast_model.scoring_memory(SMALL, calibration, 0) == CONTEXT + held + 3 * 4 * 32 * 50
    more = calibration.model_copy(update={"batch_size": 4})
    assert forecast_model.scoring_memory(SMALL, more, 0) == CONTEXT + held + 17 * 2 * 8 * 4 * 32
    # Of a repair its own states; a second layer, three squares of the width and a batch twice in float32
    width = SMALL.dimensions.width
    squares = 4 * width * (3 * width + 2 * 2 * 32) + SMALL.dimensions.params_per_layer * 2
    held += 4 * 32 * 8 * 2
    assert forecast_model.scoring_memory(SMALL, calibration, 8) == CONTEXT + held + max(
        3 * 4 * 32 * 50, squares
    )
    # Two an iteration and two of the control; all but the last two of the loop hold Adam's state.
    two = load_config(TINY, {"schedule.iterations": 2})
    assert (
        forecast_model.checkpoint_bytes(two, SMALL) == 2000 + 2 * 1000 * (2 + 8) + 2 * 2 * 1000 * 2
    )
    assert forecast_model.checkpoint_bytes(load_config(TINY, {"control": False}), SMALL) == 1000 * (
        9 * 2 + 6 * 8
    )


def test_steps_tokens_and_hours_are_those_of_the_plan(large):
    settings = config(large)
    run = forecast(settings)
    for changes in ({}, {"gate.enabled": True}, {"control": False}, {"resources.doctor": True}):
        other = config(large, **changes)
        computing = [
            node.name
            for node in nodes(other)
            if node.name not in ("doctor", "import-model", "report")
        ]
        assert [step.step for step in forecast(other).steps] == computing, changes
    tokens = [step.tokens for step in run.steps if step.step.startswith("recover")]
    assert tokens == [it.tokens for it in plan(settings.schedule, settings.prune)]
    # Widths are rounded as prune rounds them.
    assert (
        run.steps[-1].model.params
        == run.steps[-4].model.params
        == pytest.approx(0.6 * run.shape.params, rel=0.01)
    )
    assert run.steps[-1].model.params <= 0.6 * run.shape.params
    # At 35 % of the peak: three passes of recovery; of evaluation prompts, and eight batches of answers.
    dense, last = run.shape.dimensions, run.steps[-2]
    trained = 3 * forward_flops(run.shape, last.model, 1e8, 512) / (0.35 * 989e12)
    assert last.hours == pytest.approx(trained / 3600)
    prompts = forward_flops(run.shape, dense, 500 * 512, 512) / (0.35 * 989e12)
    # of 60 tokens, by the YAML
    answers = 8 * 60 * decode_seconds(run.shape, dense, 64, 2, 572, GPUS["h100"])
    first = forecast(config(large, **{"evaluate.batch_size": 64})).steps[0]
    assert first.hours == pytest.approx((prompts + answers) / 3600) and first.tokens == 500 * 572
    sampled = forecast(
        config(large, **{"evaluate.batch_size": 64, "evaluate.tasks.0.samples": 16})
    ).steps[0]
    assert sampled.hours == pytest.approx((16 * prompts + 125 / 8 * answers) / 3600)  # batches
    assert sampled.tokens == 16 * 500 * 572
    scored = forward_flops(run.shape, dense, 128 * 256, 256) / (0.35 * 67e12)
    assert run.steps[1].hours == pytest.approx(scored / 3600) and run.steps[1].tokens == 128 * 256


def test_own_answers_take_the_hours_of_the_dense_model(large):
    own = {"training.answers": "self", "training.samples": 4}
    steps = {step.step: step for step in forecast(config(large, **own)).steps}
    assert (
        steps["answers"].model.params
        == steps["evaluate-0"].model.params
        > steps["prune-1"].model.params
    )
    assert steps["answers"].tokens == 8000 * (512 + 1024)


def test_every_kind_of_training_takes_its_passes(large):
    def hours(gpus=1, **stage):
        settings = config(large, recover=[{"dtype": "bfloat16"} | stage], control=False)
        return forecast(settings, count=gpus).of("recover")[0].hours

    plain = hours()
    assert hours(gradient_checkpointing=True) == pytest.approx(4 / 3 * plain)
    assert hours(dtype="float32") == pytest.approx(989 / 67 * plain)
    run = forecast(config(large))
    step = run.of("recover")[0]
    teacher = (
        forward_flops(run.shape, run.shape.dimensions, step.tokens, 512) / (0.35 * 989e12) / 3600
    )
    assert hours(method="distil") == pytest.approx(plain + teacher)
    # GRPO by its steps: 16 of the first iteration's 240 / 15.
    grpo = {"method": "grpo", "batch_size": 64, "max_completion_length": 88, "beta": 0.0}
    passes = 3 * forward_flops(run.shape, step.model, 16 * 64 * 600, 600) / (0.35 * 989e12)
    answers = 16 * 88 * decode_seconds(run.shape, step.model, 64, 4, 88, GPUS["h100"])
    assert hours(**grpo) == pytest.approx((passes + answers) / 3600)
    # answers on each GPU
    fewer = 16 * 88 * decode_seconds(run.shape, step.model, 32, 4, 88, GPUS["h100"])
    assert hours(2, **grpo) == pytest.approx((passes / 2 + fewer) / 3600)
    assert hours(**grpo | {"beta": 0.1}) == pytest.approx((4 / 3 * passes + answers) / 3600)


def test_a_remedy_that_is_applied_fits(large):
    """Llama 3 70B on H100s: weights alone exceed one of them, so that no smaller batch can help."""
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    (large / "config.json").write_text(json.dumps(PUBLISHED["llama3_8b"] | sizes))

    def too_large(stage, count, nodes=1):
        said = remedies.warnings(
            forecast(config(large, recover=[{"dtype": "bfloat16"} | stage]), "h100", count, nodes)
        )
        return {warning[:7]: warning.partition("80 GiB: ")[2] for warning in said}

    lora, sharded = {"lora": {"rank": 16}}, {"sharding": "fsdp"}
    for stage, count, machines in ((lora, 8, 1), ({}, 8, 4)):
        assert too_large(stage, count, machines)["recover"] == "recover.sharding: fsdp"
        assert "recover" not in too_large(stage | sharded, count, machines)
    more = "no setting makes it fit on these GPUs: give it more GPUs or nodes with recover.sharding: fsdp"
    assert (
        too_large({}, 8)["recover"]
        == f"{more}, or set recover.lora, or take a larger GPU (h200, b200)"
    )
    assert "recover" not in too_large(lora | sharded, 8) and "recover" not in too_large(
        sharded, 8, 2
    )
    assert too_large(lora, 1)["recover"] == more
    assert too_large({}, 8)["evaluat"] == "evaluate.backend: vllm and evaluate.speed.repeats: 0"
    more = "give it more GPUs with evaluate.backend: vllm and evaluate.speed.repeats: 0"
    assert too_large({}, 1)["evaluat"].endswith(f": {more}, or take a larger GPU (b200)")


def test_pruning_holds_taylors_hidden_states_in_host_memory(large):
    def first_prune(**changes):
        return forecast(config(large, **changes)).of("prune")[0]

    paper, taylor = (first_prune(prune={"criterion": criterion}) for criterion in ("max", "taylor"))
    assert taylor.memory == paper.memory and taylor.hours == pytest.approx(3 * paper.hours)
    assert first_prune(prune={"criterion": "max", "repair": 128}).hours == pytest.approx(
        5 * paper.hours
    )
    # 34 x 128 x 256 states of 4096 x 2 bytes
    assert taylor.note == f"{paper.note}, 8.5 GiB of host memory"
    repaired = first_prune(prune={"criterion": "max", "repair": 1024})
    # of both models 1024 x 256 states
    assert repaired.note == f"{paper.note}, 4.0 GiB of host memory"
    # their scores need no gradients
    assert "host" not in first_prune(prune={"target": "layers"}).note


def test_more_gpus_take_less_time_and_those_of_all_nodes_are_counted(large):
    assert [devices(None, 4), devices(2, 4), devices(8, 4), devices(None, 0)] == [4, 2, 4, 1]
    one, four = (forecast(config(large), "a100-80", count) for count in (1, 4))
    hours = [[step.hours for step in run.steps if "recover" in step.step] for run in (one, four)]
    assert hours[1] == pytest.approx([each / 4 for each in hours[0]])
    # Answered by transformers: three GPUs are held, and idle.
    assert (four.steps[0].hours, four.steps[0].gpus) == (pytest.approx(one.steps[0].hours), 4)
    # Answered by vLLM: 500 items are 8 batches, or 2 on each GPU.
    by_vllm = config(large, **{"evaluate.backend": "vllm", "evaluate.speed.repeats": 0})
    divided = forecast(by_vllm, "a100-80", 4).steps[0]
    assert divided.hours == pytest.approx(one.steps[0].hours / 4)
    steps = {"prune": {"accelerators": 2}, "recover": {"nodes": 4}}
    gpus = {
        "resources.accelerator": "nvidia.com/gpu",
        "resources.accelerators": 8,
        "resources.steps": steps,
    }
    asked = config(large, **gpus)
    run = forecast(asked)
    held = {step.step: (step.gpus, step.nodes, step.gpu_hours / step.hours) for step in run.steps}
    assert (held["recover-1"], held["prune-1"], held["evaluate-0"]) == (
        (8, 4, 32),
        (2, 1, 2),
        (8, 1, 8),
    )
    assert run.gpu_hours == pytest.approx(sum(step.gpu_hours for step in run.steps))
    # The command line comes before the config.
    assert forecast(asked, num_nodes=2).of("recover")[0].nodes == 2
    assert forecast(asked, count=4).of("recover")[0].gpus == 4
    one, four = (forecast(asked, num_nodes=nodes).of("recover")[0] for nodes in (1, 4))
    assert four.hours == pytest.approx(one.hours / 4) and four.gpu_hours == pytest.approx(
        one.gpu_hours
    )


def test_each_iteration_counts_its_own_unit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["qwen3_30b_a3b"]))
    shape = shape_of(str(tmp_path))
    # 30.5 billion parameters, 3.3 billion of them active, say its authors.
    assert (shape.params, shape.dimensions.active_params) == (30_532_122_624, 3_353_032_704)

    def steps(target):
        changes = {"model.path": str(tmp_path), "schedule.target": 0.3, "prune.target": target}
        return {step.step: step for step in forecast(load_config(TINY, changes)).steps}

    experts, layers = steps("experts"), steps("layers")
    assert experts["prune-4"].model.params == pytest.approx(0.7 * 30_532_122_624, rel=0.02)
    # reap needs one pass, and keeps no states of every layer
    assert experts["prune-1"].note.endswith("of 128 experts")
    # Layers are attention too.
    per_token = [layers[f"recover-{i}"].hours / layers[f"recover-{i}"].tokens for i in (1, 2, 3)]
    assert per_token[0] > per_token[1] > per_token[2]


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED if path.stem.startswith("paper-")])
def test_the_papers_configs_remove_30_to_40_percent_neurons_first(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    run = forecast(load_config(CONFIGS / f"{name}.yaml", {"model.path": str(tmp_path)}))
    (path,), dense = run.paths["loop"], run.shape.dimensions
    assert 0.3 <= 1 - path[-1][1].params / dense.params <= 0.4
    assert [iteration.unit for iteration, _ in path] == ["neurons"] * (len(path) - 1) + ["layers"]
    widths = [dense.width, *(model.width for _, model in path[:-1])]
    # 1,000, in multiples of 128
    assert all(896 <= wider - narrower <= 1024 for wider, narrower in pairwise(widths))
    assert not any("assumed" in step.note for step in run.steps)  # the suite's numbers of items
