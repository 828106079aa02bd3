"""Mixtures of experts before a run: what the plan says of them, and what is refused."""

import pytest
from recovering import DENSE, ROOT
from tiny_models import build, save
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ptl.cli.app import app
from ptl.errors import InputError
from ptl.model import dimensions

TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A mixture with the tiny reasoner's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build("olmoe", vocab_size=len(tokenizer), max_position_embeddings=256, num_experts=12, **ids)
    folder = save(model, tmp_path_factory.mktemp("mixture") / "model", tokenizer=False)
    tokenizer.save_pretrained(folder)
    return folder


def ptl(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    error = str(result.exception) if isinstance(result.exception, InputError) else ""
    return result.output + error


def with_model(folder, **changes):
    settings = {"model.path": str(folder), "prune.target": "experts", "schedule.target": 0.3} | changes
    return [part for field, value in settings.items() for part in ("--set", f"{field}={value}")]


def test_the_plan_says_how_many_experts_remain(small):
    said = ptl("plan", TINY, *with_model(small, **{"schedule.iterations": 2}))
    assert "215,392" in said and "77,152" in said
    assert "Active" in said and "8 of 12 experts" in said and "7 of 12 experts" in said


def test_the_plan_says_how_many_neurons_of_each_expert_remain(small):
    said = ptl("plan", TINY, *with_model(small, **{"schedule.iterations": 2, "prune.target": "neurons"}))
    assert "Active" in said and "24 of 40 neurons" in said
    assert "58,720" in said  # 77,152 less 16 neurons of 3 x 32 weights in 3 experts of 4 layers


def test_a_dense_model_has_no_column_for_active_parameters():
    said = ptl("plan", TINY)
    assert "Active" not in said and "80 of 192 neurons" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.path": str(DENSE)}, "a dense model has no experts"),
        ({"schedule.target": 0.9}, "cannot be reached by experts: each token needs 3 of them"),
        ({"prune.target": "neurons", "schedule.target": 0.9}, "cannot be reached by neurons: prune.width_multiple="),
    ],
)
def test_what_cannot_be_is_refused(small, changes, said):
    assert said in " ".join(ptl("validate", TINY, *with_model(small, **changes)).split())


def test_prune_by_hand_removes_experts_where_the_config_does(small, tmp_path):
    settings = with_model(small, **{"schedule.target": 0.2, "calibration.num_sequences": 4})
    assert '"experts": 9' in ptl("prune", small, tmp_path / "one", "--config", TINY, *settings)
    by_option = ptl(
        "prune", small, tmp_path / "two", "--config", TINY, "--set", "prune.target=experts", "--target", 0.2
    )
    assert '"criterion": "reap"' in by_option
    assert dimensions.static_cost(tmp_path / "one").params == dimensions.static_cost(tmp_path / "two").params
