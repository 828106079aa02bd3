"""How well a model still predicts held-out text."""

import json
import math

import numpy as np
import pytest
from checkout import DENSE, EXAMPLE
from scipy import stats

from ptl.config.run import Evaluate, Gate
from ptl.errors import InputError
from ptl.evaluation import gate, retention
from ptl.evaluation.evaluate import evaluate_checkpoint
from ptl.evaluation.paired import Outcomes, paired
from ptl.evaluation.retention import TextLosses

SAME = paired(Outcomes([1] * 500, [1] * 500), 0.02, 0.05)  # not inferior, strictly too


def settings(**fields):
    return Evaluate(tasks=[{"name": str(EXAMPLE / "tiny_reasoner.yaml"), "limit": 4}], **fields)


def losses(*nats):
    """Texts of ten tokens and as many bytes, by the loss of a token."""
    return TextLosses("x", 10 * len(nats), [10] * len(nats), [10 * each for each in nats])


@pytest.mark.parametrize(
    "added", ["$A", "<|pad|> $A", "<|pad|> <|eos|> $A", "<|pad|> $A <|eos|>", "$A <|eos|>"]
)
def test_losses_are_those_of_transformers(tmp_path, added):
    """What the tokenizer adds is not scored, be it one token or two in front, or one behind."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (EXAMPLE / "test.jsonl").read_text().splitlines()[:5]]
    written = [f"{row['question']}\n{row['answer']}" for row in rows]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
    # As many models have it, weights in bfloat16 and BOS, with which the tokenizer begins every text, or none.
    tokenizer, model = (
        AutoTokenizer.from_pretrained(DENSE),
        AutoModelForCausalLM.from_pretrained(DENSE),
    )
    tokenizer.bos_token = "<|pad|>"
    specials = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|pad|>", "<|eos|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(added, special_tokens=specials)
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    model.bfloat16().save_pretrained(folder)
    found = evaluate_checkpoint(
        folder, tmp_path / "out", settings(retention=str(path)), seed=0
    ).retention
    for text, tokens, loss in zip(written, found.tokens, found.losses, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        before, after = added.split("$A")
        start, end = max(len(before.split()), 1), len(ids[0]) - len(after.split())
        scored = slice(start - 1, end - 1)
        expected = torch.nn.functional.cross_entropy(
            logits[scored], ids[0, start:end], reduction="sum"
        ).item()
        assert (tokens, loss) == (end - start, pytest.approx(expected, rel=2e-3))
    assert found.bytes == sum(map(len, written)) and any(loss % 1 for loss in found.losses)
    # It was never trained on English.
    prose = evaluate_checkpoint(DENSE, tmp_path / "prose", settings(), seed=0).retention
    assert prose.texts == "retention.jsonl" and not prose.is_known


def test_what_ships_is_prose_of_which_no_text_is_scored_on():
    held_out = retention.texts(settings())
    assert len(held_out) == len(set(held_out)) > 50 and min(map(len, held_out)) > 200
    guard = retention.PROSE.parents[1].joinpath("data/general.jsonl").read_text()
    assert not any(json.dumps(text, ensure_ascii=False) in guard for text in held_out)


def test_the_ratio_is_paired_by_text():
    found = retention.compare(losses(1, 2, 3), losses(1.1, 2.1, 3.1), 0.05)
    assert (found.dense, found.candidate) == (
        pytest.approx(math.exp(2)),
        pytest.approx(math.exp(2.1)),
    )
    # All texts lost as much: there is nothing to doubt, however different they are.
    assert [found.ratio, found.low, found.high] == pytest.approx([math.exp(0.1)] * 3)
    spread = retention.compare(losses(1, 2, 3), losses(1.3, 2, 3), 0.05)
    assert spread.low < spread.ratio == found.ratio < spread.high
    # What the dense model did not know, in bits for a byte, is not compared.
    assert losses(2.7, 2.8).is_known
    assert retention.compare(losses(2.7, 2.9), losses(1, 1), 0.05) is None


def test_the_bounds_are_those_of_student():
    nats = [0.1, 0.3, 0.0, 0.25, 0.4]
    found = retention.compare(losses(*[1] * 5), losses(*[1 + each for each in nats]), 0.05)
    for bound, alternative in ((found.low, "greater"), (found.high, "less")):
        interval = stats.ttest_1samp(nats, 0, alternative=alternative).confidence_interval(0.95)
        assert math.log(bound) == pytest.approx(
            interval.low if alternative == "greater" else interval.high
        )


@pytest.mark.parametrize("skew", [0, -1, 1])
def test_what_keeps_the_limit_is_rejected_as_often_as_alpha_says(skew):
    """Texts of many lengths, whose true ratio is the limit: 2,000 sets of as many texts as ship."""
    random, limit, rejected = np.random.default_rng(5 + skew), 1.2, 0
    for _ in range(2_000):
        tokens = random.integers(60, 400, size=54)
        noise = random.normal(size=54) if skew == 0 else skew * (random.gamma(4, size=54) - 4) / 2
        dense = random.normal(3, 0.3, size=54) * tokens
        after = dense + (math.log(limit) + 0.05 * noise) * tokens
        sets = [TextLosses("x", 10**9, tokens.tolist(), nats.tolist()) for nats in (dense, after)]
        rejected += retention.compare(*sets, 0.05).fails(limit, strict=False)
    assert 0.035 < rejected / 2_000 < 0.070, rejected


def test_a_file_without_texts_is_refused(tmp_path):
    path, single = tmp_path / "mine.jsonl", '{"text": "a"}'
    problems = {
        single: "has a single text",
        single + '\n{"txt": "b"}': "row 2 of .* has no text",
        "": "is empty",
    }
    problems[single + '\n{"text": "\\ud83d"}'] = "row 2 of .* has no text"
    for written, problem in {None: "no file", **problems}.items():
        if written is not None:
            path.write_text(written)
        with pytest.raises(InputError, match=rf"evaluate\.retention: .*{problem}"):
            retention.texts(settings(retention=str(path)))


def test_the_gate_holds_it():
    def decision(after, **fields):
        retained = retention.compare(losses(1, 2), losses(*after), 0.05)
        sizes = {"params": 80, "target_params": 60, "parent_params": 100}
        wanted = Gate(enabled=True, retention=1.2, **fields)
        return gate.decide(
            wanted, gate.State(), **sizes, baseline=SAME, parent=SAME, retained=retained
        )

    assert decision((1.1, 2.1)).decision == "accepted"
    # broken
    assert decision((math.nan, 2.1)).decision == decision((1e6, 1e6)).decision == "rejected"
    rejected = decision((1.3, 2.3))
    assert rejected.decision == "rejected" and rejected.state.cap == 10
    assert "times 1.35 (1.35 to 1.35, 2 texts), and 1.2 is tolerated" in rejected.reason
    # What may be above is not accepted where that must be shown.
    assert decision((1.0, 2.3)).decision == "accepted"
    assert decision((1.0, 2.3), strict=True).decision == "rejected"
    with pytest.raises(InputError, match=r"gate\.retention: 1.2, but the dense model"):
        retention.check_gate(Gate(enabled=True, retention=1.2), losses(9, 9))
    retention.check_gate(Gate(enabled=True), losses(9, 9))
