"""How much a recovery trains: tokens for each removed parameter, and passes over the rows."""

from __future__ import annotations

from dataclasses import dataclass

# Tokens for each removed parameter. The paper has 160M for 1.57B of 8B; SmolLM2-135M with 0.0024 to 0.0035 more than
# doubled the perplexity of other text (docs/results.md, "A pretrained model with few tokens").
PER_PARAMETER = 0.1
LEAST = PER_PARAMETER / 10  # fewer are warned of
# Over the rows, after which repetition helps little (Muennighoff et al. 2023, 2305.16264).
PASSES = 4


@dataclass(frozen=True)
class Amount:
    """The tokens of a recovery beside what was removed and what there is to read."""

    tokens: int
    removed: int  # parameters
    passes: float | None  # over the source that is read most often; None: not known

    @property
    def sentence(self) -> str:
        """Both ratios in words; empty where nothing is trained on text, or nothing was removed."""
        if not self.tokens or self.removed <= 0:
            return ""
        ratio = _two_digits(self.tokens / self.removed)
        sentence = f"{self.tokens:,} recovery tokens: {ratio} per removed parameter"
        if self.passes is None:
            return sentence
        return f"{sentence}, about {_two_digits(self.passes)} passes over the rows"

    def warnings(self, least: float = LEAST) -> list[str]:
        """A sentence for fewer than `least` tokens for each removed parameter, and for more than PASSES passes."""
        if not self.sentence:
            return []
        problems = []
        # Both are estimates: half a pass more is no problem.
        if float(f"{self.tokens / self.removed:.1g}") < least:
            problems.append(
                f"the paper has {PER_PARAMETER} per removed parameter, and a model with 0.0035 was far worse on other "
                "text (docs/results.md): lower schedule.target, or give more tokens and rows"
            )
        if self.passes is not None and round(self.passes) > PASSES:
            problems.append(
                f"more than {PASSES} passes help little: give more rows, or lower schedule.recovery_tokens"
            )
        return [f"{self.sentence}; {problem}" for problem in problems]


def _two_digits(value: float) -> str:
    """A number with two significant digits: 0.0042, 5.8, 10,000."""
    return f"{float(f'{value:.2g}'):,.6g}"
