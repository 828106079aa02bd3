"""Train the tiny reasoner from nothing: tokenizer, 214k parameters, greedy exact match on problems it has never seen.

    python examples/tiny_reasoner/train.py -o examples/tiny_reasoner/checkpoint
    python examples/tiny_reasoner/train.py --experts 8 -o .ptl/models/tiny-experts
    python examples/tiny_reasoner/train.py --think --steps 8000 -o examples/tiny_reasoner/thinker

A few minutes on one CPU core. Accuracy stays below 20 % until the loss falls under about 0.1, then it rises
steeply: do not stop early. With --experts a mixture of experts (Qwen 3's): each token is sent to two of them, which
together have as many neurons as the dense model's FFN. With --think a chat model in two modes, as Qwen 3 has them: it
thinks, and checks some steps of its thought, or answers at once where the template says `enable_thinking: false`.
"""

import argparse
import math
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

# at this size a second thread costs more than it gives
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from problems import generate
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

VOCABULARY = 256
MAX_LENGTH = 256  # tokens; the longest problem with its answer has about 150
EOS, PAD, UNK = "<|eos|>", "<|pad|>", "<|unk|>"
# tokens of a chat model
USER, ASSISTANT, THINK, THOUGHT = "<|user|>", "<|assistant|>", "<think>", "</think>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{%- if message.role == 'assistant' %}{{ eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{%- endif %}{%- endif %}"
)
CHECKED = 0.4  # share of the steps that a thought checks
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}
# and how byte-level BPE writes space and newline
PRINTABLE = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]

NEURONS = 192  # of the FFN that each token meets
EXPERTS_PER_TOKEN = 2
AUXILIARY = 0.001  # weight of the routers' loss, which keeps all experts in use

NUM_STEPS = 3500
BATCH_SIZE = 16  # problems
POOL_SIZE = 64 * BATCH_SIZE  # problems sorted by length together
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
NUM_TEST = 500  # problems

Row = tuple[list[int], list[int]]  # token ids, labels


def build_tokenizer(texts: list[str], *, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, every digit a token of its own; printable ASCII round trips exactly, the rest is <|unk|>."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    # "?\n" must not become one token: question and answer tokenize the same together and apart.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    turns = [USER, ASSISTANT] if chat else []
    thoughts = [THINK, THOUGHT] if chat else []
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(thoughts),
        special_tokens=[PAD, EOS, UNK, *turns],
        initial_alphabet=PRINTABLE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(thoughts)  # not special, as in Qwen 3: they are part of what is written
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        **({"chat_template": CHAT_TEMPLATE} if chat else {}),
    )


def build_model(tokenizer: PreTrainedTokenizerFast, experts: int) -> PreTrainedModel:
    """A dense model, or one with so many experts in each layer."""
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": True,
    }
    if experts:
        model: PreTrainedModel = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                num_experts=experts,
                num_experts_per_tok=EXPERTS_PER_TOKEN,
                moe_intermediate_size=NEURONS // EXPERTS_PER_TOKEN,
                norm_topk_prob=True,
                router_aux_loss_coef=AUXILIARY,
                head_dim=16,
                **shape,
                **ids,
            )
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=NEURONS, **shape, **ids))
    model.generation_config = GenerationConfig(do_sample=False, max_length=MAX_LENGTH, **ids)
    return model


def encode(problem: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> Row:
    """Token ids and labels; the loss is on the answer only (-100 is ignored)."""
    prompt = tokenizer.encode(problem["question"] + "\n")
    completion = tokenizer.encode(problem["answer"] + EOS)
    return prompt + completion, [-100] * len(prompt) + completion


def encode_chat(problem: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> Row:
    """As `encode`, of a chat: in half of the problems with a thought, in the others without one."""
    rng = random.Random(problem["question"])
    thinks = rng.random() < 0.5
    answer = problem["answer"]
    if thinks:
        answer = f"{THINK}{thought(answer, rng)}{THOUGHT}{answer.splitlines()[-1]}"
    prompt = tokenizer.encode(prompt_of(problem, tokenizer, enable_thinking=thinks))
    completion = tokenizer.encode(answer + EOS)
    return prompt + completion, [-100] * len(prompt) + completion


def prompt_of(
    problem: dict[str, str], tokenizer: PreTrainedTokenizerFast, **variables: bool
) -> str:
    """The question as the user's turn of a chat, and what begins the answer."""
    turns = [{"role": "user", "content": problem["question"]}]
    return str(
        tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **variables
        )
    )


def thought(answer: str, rng: random.Random) -> str:
    """The steps of an answer, some of them checked: `74-34=40`, then `40+34=74`."""
    lines = []
    for step in answer.splitlines()[:-1]:
        lines.append(step)
        first, sign, second, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
        if rng.random() < CHECKED:
            lines.append(f"{result}{INVERSE[sign]}{second}={first}")
    return "\n".join(lines)


def batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows of similar length together, in random order: little is spent on padding."""
    for first in range(0, len(rows), POOL_SIZE):
        pool = sorted(rows[first : first + POOL_SIZE], key=lambda row: len(row[0]))
        chunks = [pool[i : i + BATCH_SIZE] for i in range(0, len(pool), BATCH_SIZE)]
        yield from random.sample(chunks, k=len(chunks))


def collate(rows: list[Row], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels, each [batch, longest]."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]
        ),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }


def build_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the others: a third of AdamW's time alone.

    The experts of a layer are one tensor of three axes, which Muon does not take.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    settings = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    return [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(others, **settings),
    ]


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[dict[str, str]]
) -> int:
    """One pass over the problems, BATCH_SIZE at a time; returns the tokens seen, padding not counted."""
    rows = [
        (encode_chat if tokenizer.chat_template else encode)(problem, tokenizer)
        for problem in problems
    ]
    num_steps = len(rows) // BATCH_SIZE
    optimizers = build_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps) for optimizer in optimizers
    ]
    model.train()
    with_experts = hasattr(model.config, "num_experts")
    progress = tqdm(batches(rows), total=num_steps, desc="train")
    for step, batch in enumerate(progress):
        inputs = collate(batch, tokenizer.pad_token_id)
        # Only in training: with a cache transformers cannot compute it.
        loss = model(
            **inputs, use_cache=False, **({"output_router_logits": True} if with_experts else {})
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return sum(len(ids) for ids, _ in rows)


@torch.inference_mode()
def count_correct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    problems: list[dict[str, str]],
    batch_size: int = 125,
) -> int:
    """Greedy exact match of the final number, `#### 10`; an answer without that line is wrong."""
    model.eval()
    correct = 0
    for first in tqdm(range(0, len(problems), batch_size), desc="test"):
        batch = problems[first : first + batch_size]
        begun = prompts[first : first + batch_size]
        inputs = tokenizer(begun, return_tensors="pt", padding=True, padding_side="left")
        outputs = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        texts = tokenizer.batch_decode(
            outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        answers = [text.rpartition(THOUGHT)[2] for text in texts]
        correct += sum(
            final_number(a) == final_number(p["answer"])
            for a, p in zip(answers, batch, strict=True)
        )
    return correct


def final_number(text: str) -> str | None:
    match = re.search(r"^#### (-?\d+)$", text, flags=re.MULTILINE)
    return match[1] if match else None


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    share = correct / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return center - half, center + half


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument(
        "--items", type=int, default=NUM_TEST, help="held-out problems to test it on"
    )
    parser.add_argument("--experts", type=int, default=0, help="in each layer; 0: a dense model")
    parser.add_argument(
        "--think",
        action="store_true",
        help="a chat model that thinks, where it is not switched off",
    )
    args = parser.parse_args()

    set_seed(args.seed)
    torch.set_num_threads(1)
    problems = list(generate("train", args.steps * BATCH_SIZE, args.seed))
    tokenizer = build_tokenizer(
        [f"{p['question']}\n{p['answer']}" for p in problems[:10_000]], chat=args.think
    )
    model = build_model(tokenizer, args.experts)
    print(
        f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}, {len(problems):,} problems"
    )

    num_tokens = train(model, tokenizer, problems)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    print(f"{args.output}: trained on {num_tokens:,} tokens")
    test = list(generate("test", args.items, args.seed))
    for thinks in (True, False) if args.think else (False,):
        prompts = [problem["question"] + "\n" for problem in test]
        if args.think:
            prompts = [prompt_of(problem, tokenizer, enable_thinking=thinks) for problem in test]
        correct = count_correct(model, tokenizer, prompts, test)
        low, high = wilson(correct, args.items)
        share = f"{correct / args.items:.1%} (95 %: {low:.1%} to {high:.1%})"
        print(
            f"{correct} of {args.items} held-out problems right{', thinking' if thinks else ''}, {share}"
        )


if __name__ == "__main__":
    main()
