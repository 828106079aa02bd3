"""Word problems of two to four steps of + - * /, with every step of the answer written out.

    Mia has 74 pens. Later she loses 34 pens. Then she gives Tom 30 pens. How many pens does Mia have now?

    74-34=40
    40-30=10
    #### 10

A problem belongs to the train or to the test split by a hash of its arithmetic (the first number and the operations),
not of its text: no chain of operations that is tested was ever trained on, whatever the names and objects around it.

Standard library only. The same split, count and seed give the same bytes everywhere: `Random.random()` after seeding
is the one sequence that Python promises to keep between versions, so every draw goes through it.
"""

import argparse
import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

SPLITS = ("train", "test")
TEST_SHARE = 0.1  # of all arithmetic
LARGEST = 99  # no number in a problem or in its answer is above this
DISTRACTOR_SHARE = 0.3  # problems with one sentence whose number must be ignored

Operation = tuple[str, int]  # ("-", 34)

SHE = ("Ada", "Amy", "Ana", "Eva", "Ida", "Joy", "Kim", "Liz", "Mia", "Pam", "Sue", "Zoe")
HE = ("Ali", "Ben", "Bob", "Dan", "Ed", "Ian", "Jim", "Leo", "Max", "Ned", "Sam", "Tom")

THINGS = (
    "apples", "beads", "bells", "books", "boxes", "cakes", "cards", "coins", "cups", "dolls", "eggs", "hats",
    "jars", "keys", "lamps", "maps", "nuts", "pens", "pins", "pots", "rings", "seeds", "stones", "toys",
)  # fmt: skip

OPENINGS = (
    "{name} has {n} {things}.",
    "{name} starts with {n} {things}.",
    "At first {name} has {n} {things}.",
)

# The verb alone does not tell the operation: who gives and who gets decides. Every phrase names the things, so that a
# distractor just before it leaves nothing to guess.
PHRASES = {
    "+": (
        "{they} buys {n} {things}",
        "{they} finds {n} {things}",
        "{they} gets {n} more {things}",
        "{friend} gives {name} {n} {things}",
    ),
    "-": (
        "{they} gives {friend} {n} {things}",
        "{they} loses {n} {things}",
        "{they} sells {n} {things}",
        "{friend} gets {n} {things} from {name}",
    ),
    "*": (
        "{they} gets {n} times as many {things}",
        "the {things} grow to {n} times as many",
        "{they} swaps each of the {things} for {n}",
    ),
    "/": (
        "{they} keeps one of every {n} {things}",
        "{they} shares the {things} in {n} parts and keeps one",
        "{they} puts the {things} in {n} bags and keeps one",
    ),
}

CONNECTIVES = ("", "Then ", "Later ", "Now ")

DISTRACTORS = (
    "{friend} has {n} {others}.",
    "{friend} buys {n} {others}.",
    "{name} has {n} {others}.",
    "{name} finds {n} {others}.",
)

QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} does {name} have in the end?",
    "How many {things} are left?",
)


def generate(split: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields `count` problems {"question", "answer"}, no two with the same arithmetic; fewer come first in more."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, it must be one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    seen = set()
    while len(seen) < count:
        start, operations = draw_arithmetic(rng)
        key = arithmetic_key(start, operations)
        if split_of(key) == split and key not in seen:
            seen.add(key)
            yield {
                "question": write_question(rng, start, operations),
                "answer": write_answer(start, operations),
            }


def draw_arithmetic(rng: random.Random) -> tuple[int, list[Operation]]:
    """A first number and two to four operations that stay whole and within 1..LARGEST."""
    start = value = between(rng, 2, LARGEST)
    operations = []
    for _ in range(between(rng, 2, 4)):
        operation = draw_operation(rng, value)
        value = apply(value, operation)
        operations.append(operation)
    return start, operations


def draw_operation(rng: random.Random, value: int) -> Operation:
    """One operation that `value` allows: first the sign, evenly, then its number."""
    divisors = [n for n in range(2, 10) if value % n == 0]
    choices = {
        "+": range(2, LARGEST - value + 1),
        "-": range(2, value),
        "*": range(2, min(9, LARGEST // value) + 1),
        "/": divisors,
    }
    sign = pick(rng, [sign for sign, numbers in choices.items() if numbers])
    return sign, choices[sign][int(rng.random() * len(choices[sign]))]


def apply(value: int, operation: Operation) -> int:
    sign, n = operation
    return {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[sign]


def arithmetic_key(start: int, operations: Sequence[Operation]) -> str:
    """The arithmetic alone, as text: `74-34-30`."""
    return str(start) + "".join(f"{sign}{n}" for sign, n in operations)


def split_of(key: str) -> str:
    """The one split in which this arithmetic may occur."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"


def write_question(rng: random.Random, start: int, operations: Sequence[Operation]) -> str:
    # The friend is of the other gender, so that "he" and "she" are never in doubt.
    is_she = rng.random() < 0.5
    words = {
        "name": pick(rng, SHE if is_she else HE),
        "they": "she" if is_she else "he",
        "friend": pick(rng, HE if is_she else SHE),
        "things": pick(rng, THINGS),
    }
    sentences = [pick(rng, OPENINGS).format(n=start, **words)]
    for sign, n in operations:
        sentence = pick(rng, CONNECTIVES) + pick(rng, PHRASES[sign]).format(n=n, **words) + "."
        sentences.append(sentence[0].upper() + sentence[1:])
    if rng.random() < DISTRACTOR_SHARE:
        others = pick(rng, [thing for thing in THINGS if thing != words["things"]])
        distractor = pick(rng, DISTRACTORS).format(
            n=between(rng, 2, LARGEST), others=others, **words
        )
        sentences.insert(between(rng, 1, len(sentences)), distractor)
    return " ".join([*sentences, pick(rng, QUESTIONS).format(**words)])


def write_answer(start: int, operations: Sequence[Operation]) -> str:
    lines, value = [], start
    for sign, n in operations:
        result = apply(value, (sign, n))
        lines.append(f"{value}{sign}{n}={result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])


def pick(rng: random.Random, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def between(rng: random.Random, low: int, high: int) -> int:
    """A whole number, both ends included."""
    return low + int(rng.random() * (high - low + 1))


def write_jsonl(problems: Iterator[dict[str, str]], path: Path) -> None:
    """One JSON object a line; gzipped, with no time and no name inside, when the path ends in .gz."""
    data = "".join(json.dumps(problem) + "\n" for problem in problems).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--count", type=int, required=True, help="number of problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".jsonl or .jsonl.gz"
    )
    args = parser.parse_args()
    write_jsonl(generate(args.split, args.count, args.seed), args.output)


if __name__ == "__main__":
    main()
