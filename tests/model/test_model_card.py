"""What the card of a compressed model repeats from the dense model's card."""

import json

import pytest

from ptl.model.model_card import published

OTHER = "license: other\nlicense_name: qwen\nlicense_link: https://hf.co/x"
CARD = f"---\n{OTHER}\nbase_model: [org/base, org/two]\n---\n# It\n"


@pytest.fixture
def folder(tmp_path):
    """A local checkpoint: a card and a config are all that is read."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def fields(**known):
    return {"base_model": "", "license": "", "license_name": "", "license_link": ""} | known


def test_the_license_and_the_base_model_are_read_from_the_card(folder):
    (folder / "README.md").write_text(CARD)
    license_fields = {"license": "other", "license_name": "qwen", "license_link": "https://hf.co/x"}
    assert published(f"./{folder.name}", folder) == fields(base_model="org/base", **license_fields)
    # A model of the hub is itself what is compressed.
    assert published("org/model-1", folder) == fields(base_model="org/model-1", **license_fields)


def test_a_folder_of_the_hubs_cache_and_an_older_config_name_the_model(folder):
    snapshot = folder / "models--org--model-1.5" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert published(str(snapshot), snapshot) == fields(base_model="org/model-1.5")
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "org/older"}))
    assert published(str(folder), folder) == fields(base_model="org/older")
    # A path of the machine that saved it is no name of a model.
    for path in ("/home/me/model", "./model", ""):
        (folder / "config.json").write_text(json.dumps({"_name_or_path": path}))
        assert published(str(folder), folder) == fields()


@pytest.mark.parametrize(
    "card", [None, b"# No metadata", b"---\nlicense: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe---"]
)
def test_a_checkpoint_without_a_readable_card_has_no_license(card, folder, capsys):
    if card is not None:
        (folder / "README.md").write_bytes(card)
    assert published("./model", folder) == fields()
    assert (
        "the model card will name no license: README.md of ./model is missing or names none"
        in capsys.readouterr().out
    )
