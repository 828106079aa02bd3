"""What a config reads of its rows is checked before any work."""

import pytest
from rows import ANSWERED, ASKED, rows_file

from ptl.config.data import DataSource, Decontaminate, Reward, TrainingData
from ptl.config.recover import RecoverStage
from ptl.config.run import Calibration
from ptl.errors import InputError
from ptl.preflight import rows

PROMPTS = [{"messages": [ASKED]}]
CHATS = [{"messages": [ASKED, ANSWERED]}]


def chats(path, rows):
    return DataSource(source=rows_file(path, rows), format="messages")


@pytest.fixture
def asked(tmp_path):
    """Chats that end with the user's turn."""
    return chats(tmp_path / "asked.jsonl", PROMPTS)


@pytest.fixture
def whole(tmp_path):
    """Chats that end with the assistant's turn."""
    return chats(tmp_path / "whole.jsonl", CHATS)


def test_answers_are_needed_where_they_are_scored_or_trained_on(tmp_path, asked, whole):
    cpt = RecoverStage()
    distil = RecoverStage(method="distil")
    grpo = RecoverStage(method="grpo", prompts=asked)
    against = Decontaminate(against=[asked])

    def check(calibration, trained, *stages):
        training = TrainingData(sources=[whole, trained], decontaminate=against)
        rows.check_data(Calibration(data=calibration), training, stages)

    check(whole, whole, cpt, grpo)
    check(whole, asked, grpo)
    with pytest.raises(InputError, match=r"calibration\.data\.messages: row 1 "):
        check(asked, whole, grpo)
    with pytest.raises(InputError, match=r"training\.sources\.1\.messages: row 1 "):
        check(whole, asked, grpo, distil)
    blank = chats(tmp_path / "b.jsonl", [{"messages": [ASKED, ANSWERED | {"content": ""}]}])
    with pytest.raises(InputError, match=r"row 1 .*: the assistant's last turn is blank"):
        check(blank, whole)
    with pytest.raises(InputError, match=r"row 1 .*no answer to learn from"):
        check(whole, asked, cpt)


def test_prompts_of_reinforcement_learning_have_what_a_reward_compares_with(tmp_path, whole):
    row = {"prompt": "a", "completion": "b", "text": ""}
    prompts = DataSource(source=rows_file(tmp_path / "p.jsonl", [row]))
    training = TrainingData(sources=[whole])
    grpo = RecoverStage(method="grpo", prompts=prompts)
    format_only = grpo.model_copy(update={"rewards": [Reward(name="format")]})
    rows.check_rewards([format_only], training)
    rewards = [Reward(name="format"), Reward(name="code", answer="{text}")]
    with pytest.raises(InputError, match=r"row 1 .*has nothing in '\{text\}', the answer"):
        rows.check_rewards([format_only, grpo.model_copy(update={"rewards": rewards})], training)


def test_sources_are_named_by_their_fields(asked, whole):
    against = Decontaminate(against=[asked])
    training = TrainingData(sources=[whole, asked], decontaminate=against)
    stages = [RecoverStage(), RecoverStage(method="grpo", prompts=asked)]
    named = rows.named_sources(Calibration(data=whole), training, stages)
    assert named == {
        "calibration.data": whole,
        "training.sources.0": whole,
        "training.sources.1": asked,
        "training.decontaminate.against.0": asked,
        "recover.1.prompts": asked,
    }
