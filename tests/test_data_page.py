"""docs/data.md: its examples are valid configs, and its errors are those that ptl prints."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ptl.cli.configs import checked
from ptl.config.run import load_config
from ptl.errors import InputError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/data.md").read_text()
HOME = "/home/you"  # the folder of the page's config
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"

FILE = re.compile(r"`([\w.-]+)`:\n\n```json\n(.*?)```", re.S)
# A config's part, and the error that follows it, if one does.
EXAMPLE = re.compile(r"```yaml\n(.*?)```(?:\n\n```\nerror: (.*?)\n```)?", re.S)
EXAMPLES = EXAMPLE.findall(PAGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page, and a model that can chat."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(ROOT / "examples/tiny_reasoner/checkpoint", folder / "model")
    (folder / "model/chat_template.jinja").write_text(TEMPLATE)
    for name, text in FILE.findall(PAGE):
        (folder / name).write_text(text)
    rows = [json.loads(line) for line in (folder / "alpaca.jsonl").read_text().splitlines()]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    (folder / "other-benchmark.jsonl").write_text('{"question": "What is 7 * 6?"}\n')
    return folder


def config_with(part, folder):
    """A config of the tiny reasoner with the fields of an example."""
    settings = load_config(ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml").model_dump(mode="json")
    settings |= {"model": {"path": "model"}}
    for name, value in yaml.safe_load(part).items():
        settings[name] = settings[name] | value if name == "evaluate" else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(("part", "said"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_is_valid_or_has_the_error_that_follows_it(folder, part, said):
    path = config_with(part, folder)
    if not said:
        assert checked(load_config(path)).params == 213_568
        return
    with pytest.raises(InputError) as caught:
        checked(load_config(path))
    assert str(caught.value).replace(str(folder), HOME) == said


def test_the_page_has_three_errors_and_an_example_of_each_format():
    formats = {yaml.safe_load(part)["training"].get("format") for part, said in EXAMPLES if not said}
    assert formats == {None, "messages", "text"} and len([said for _, said in EXAMPLES if said]) == 3
