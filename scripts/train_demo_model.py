#!/usr/bin/env python3
"""Train the two checkpoints of ``models/demo``: a small Llama that adds, and its draft for speculative decoding.

    python scripts/train_demo_model.py --output models/demo

Both answer ``123+456=`` with ``579`` and EOS, and continue the prefixes of ``LINES`` to the letter. No prompt begins with a
BOS. What is unusual: a loss only where the answer is determined; EOS as the target after every answer even where another sum
follows on the next line, so that a chat of several turns works; sums that carry through every column drawn more often.

Both together took 38.5 minutes on two cores (AMD EPYC at 2.5 GHz with AVX-512) that other jobs used too, 40 of processor time, with the
measurement of all held-out sums; an estimated 20 where nothing else runs. Float32, since bf16 autocast was four times slower there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 384
IGNORED = -100
REQUIRED_EXACT_SHARE = 0.99
LINES = (
    ("zspmd is", " an asyncio message-passing runtime over ZeroMQ. A driver publishes each step once, and every rank runs it."),
    ("A worker", " is one process that holds one rank. It waits for a step, runs it, and pushes its result back."),
    ("The driver", " decides each step, publishes it to all ranks, and collects what they send back."),
    ("Every rank", " sees the same bytes in the same order. A rank that misses a step stops with an error."),
    ("A step", " is one forward pass by all ranks. Steps count up by one, and no number is used twice in a launch."),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '\\n' }}{% endif %}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Recipe:
    """One model's shape and training length; every count a tensor-parallel size of 4 must divide is a multiple of 4."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_steps: int
    peak_lr: float
    batch_size: int = 256

    def build_model(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        """Allocate the model with random weights from torch's global generator."""
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_layers,
                num_attention_heads=self.num_heads,
                num_key_value_heads=self.num_heads,
                head_dim=32,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                initializer_range=0.05,
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


MAIN = Recipe(hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_steps=2000, peak_lr=2e-3)
DRAFT = Recipe(hidden_size=64, intermediate_size=128, num_layers=3, num_heads=4, num_steps=2000, peak_lr=4e-3)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on ``LINES``; a digit, ``+`` and ``=`` are always a token of their own, and no BOS is added."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9+=]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([prefix + rest for prefix, rest in LINES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False)


class Problems:
    """The pairs 0..999 x 0..999, a fifth of them held out; ``a+b`` and ``b+a`` are always on the same side of the split."""

    def __init__(self, seed: int, held_out_share: float = 0.2) -> None:
        self.rng = np.random.default_rng(seed)
        upper = np.triu(self.rng.random((1000, 1000)))
        self.is_held_out = (upper + np.triu(upper, 1).T) < held_out_share

    def held_out(self) -> np.ndarray:
        """Every held-out pair, int64 [N, 2]."""
        return np.argwhere(self.is_held_out)

    def sample(self, num_pairs: int) -> np.ndarray:
        """Draw training pairs int64 [num_pairs, 2]: a quarter have columns that sum to 9 or 10."""
        wanted = 2 * num_pairs
        first, second = self._numbers(wanted), self._numbers(wanted)
        is_chain = self.rng.random(wanted) < 0.25
        second = np.where(is_chain, self._carrying_partner(first), second)
        is_swapped = self.rng.random(wanted) < 0.5
        pairs = np.stack([np.where(is_swapped, second, first), np.where(is_swapped, first, second)], axis=1)
        is_ours = ~self.is_held_out[pairs[:, 0], pairs[:, 1]]
        return np.asarray(pairs[is_ours][:num_pairs])

    def _numbers(self, count: int) -> np.ndarray:
        num_digits = self.rng.choice([1, 2, 3], size=count, p=[0.15, 0.3, 0.55])
        return self.rng.integers(np.where(num_digits == 1, 0, 10 ** (num_digits - 1)), 10**num_digits)

    def _carrying_partner(self, numbers: np.ndarray) -> np.ndarray:
        """Digit by digit 9 - d or 10 - d, so that a carry often runs through the whole sum; cut to 1-3 digits."""
        digits = numbers[:, None] // np.array([100, 10, 1]) % 10
        partner = np.minimum(9 - digits + self.rng.integers(0, 2, digits.shape), 9)
        return np.asarray(partner @ np.array([100, 10, 1]) % 10 ** self.rng.integers(1, 4, len(numbers)))


class Encoder:
    """Turn sums and lines into padded ``(ids, targets)``, both int64 [B, T]; ``targets[t]`` is what follows ``ids[t]``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.char_id = {char: tokenizer.convert_tokens_to_ids(char) for char in "0123456789+="}
        (self.newline_id,) = tokenizer.encode("\n")

    def sums(self, pairs: np.ndarray, sums_per_row: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Several sums in a row stand on lines of their own; each answer's last digit is still followed by EOS as target."""
        turns = [self._turn(int(a), int(b)) for a, b in pairs]
        rows = [zip(*turns[start : start + sums_per_row]) for start in range(0, len(turns), sums_per_row)]
        return self._pad([(list(chain(*ids)), list(chain(*targets))) for ids, targets in rows])

    def lines(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All of ``LINES``; targets start where a line's prefix ends."""
        rows = []
        for prefix, rest in LINES:
            ids = self.tokenizer.encode(prefix + rest)
            num_given = len(self.tokenizer.encode(prefix)) - 1
            rows.append((ids, [IGNORED] * num_given + ids[num_given + 1 :] + [self.eos_id]))
        return self._pad(rows)

    def _turn(self, a: int, b: int) -> tuple[list[int], list[int]]:
        question = [self.char_id[char] for char in f"{a}+{b}="]
        answer = [self.char_id[char] for char in str(a + b)]
        targets = [IGNORED] * (len(question) - 1) + answer + [self.eos_id]
        return [*question, *answer, self.newline_id], [*targets, IGNORED]

    def _pad(self, rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(ids) for ids, _ in rows)
        ids = [ids + [self.pad_id] * (width - len(ids)) for ids, _ in rows]
        targets = [targets + [IGNORED] * (width - len(targets)) for _, targets in rows]
        return torch.tensor(ids), torch.tensor(targets)


def batches(problems: Problems, encoder: Encoder, batch_size: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Yield each step's parts: sums always, three of them in a row every eighth step, the lines every fourth."""
    lines = encoder.lines()
    for step in itertools.count():
        sums = encoder.sums(problems.sample(batch_size), sums_per_row=3 if step % 8 == 7 else 1)
        yield [sums, lines] if step % 4 == 0 else [sums]


def answer_logits(model: LlamaForCausalLM, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] and targets [N] at the positions that have a target; the vocabulary projection is paid only there."""
    is_wanted = targets != IGNORED
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[is_wanted]), targets[is_wanted]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    num_warmup = max(1, recipe.num_steps // 20)
    if step < num_warmup:
        return recipe.peak_lr * (step + 1) / num_warmup
    progress = (step - num_warmup) / (recipe.num_steps - num_warmup)
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))


def train(name: str, recipe: Recipe, encoder: Encoder, seed: int) -> LlamaForCausalLM:
    """Train one model from scratch in float32 and return it; the same seed, thread count and torch give the same weights."""
    torch.manual_seed(seed)
    model = recipe.build_model(encoder.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    started = time.monotonic()
    for step, parts in enumerate(itertools.islice(batches(Problems(seed), encoder, recipe.batch_size), recipe.num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        losses = [F.cross_entropy(*answer_logits(model, *part)) for part in parts]
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(losses).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == recipe.num_steps - 1:
            shown = " ".join(f"{loss.item():.4f}" for loss in losses)
            print(f"{name} step {step:5d}/{recipe.num_steps} loss {shown} {time.monotonic() - started:6.1f} s", flush=True)
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face checkpoint with bf16 weights, readable by Transformers 4 and 5."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=96, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # save_pretrained leaves it readable by its owner alone
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    # By hand: Transformers 5 names a class that 4 lacks, moves the template to another file and drops add_bos_token.
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


@torch.inference_mode()
def find_exact(model: LlamaForCausalLM, encoder: Encoder, pairs: np.ndarray) -> np.ndarray:
    """Say for each pair whether greedy decoding gives the exact answer and EOS, bool [N].

    One pass with the answer as input suffices: greedy decoding leaves the right path at the first wrong argmax or never.
    """
    exact = []
    for start in range(0, len(pairs), 1024):
        ids, targets = encoder.sums(pairs[start : start + 1024])
        is_wanted = targets != IGNORED
        wrong = torch.zeros_like(targets, dtype=torch.bool)
        logits, wanted = answer_logits(model, ids, targets)
        wrong[is_wanted] = logits.argmax(-1) != wanted
        exact.append(~wrong.any(dim=1).numpy())
    return np.concatenate(exact)


def report_sums(name: str, model: LlamaForCausalLM, encoder: Encoder, pairs: np.ndarray) -> float:
    """Print the exact-answer share for every combination of digit lengths and return the share over all pairs."""
    is_exact = find_exact(model, encoder, pairs)
    num_digits = 1 + (pairs >= 10) + (pairs >= 100)
    for lengths in itertools.product((1, 2, 3), repeat=2):
        chosen = is_exact[(num_digits == lengths).all(axis=1)]
        print(f"{name} held out {lengths[0]}+{lengths[1]} digits: {chosen.sum():6d} of {len(chosen):6d} exact")
    print(f"{name} held out, all: {is_exact.mean():.4%} of {len(pairs)} exact", flush=True)
    return float(is_exact.mean())


@torch.inference_mode()
def report_lines(name: str, model: LlamaForCausalLM, encoder: Encoder) -> bool:
    """Continue each prefix greedily; True when every line comes out to the letter and ends in EOS."""
    is_right = True
    for prefix, rest in LINES:
        ids = torch.tensor([encoder.tokenizer.encode(prefix)])
        text = encoder.tokenizer.decode(model.generate(ids, attention_mask=torch.ones_like(ids))[0])
        verdict = "right" if text == prefix + rest + EOS else "WRONG"
        is_right &= verdict == "right"
        print(f"{name} {verdict}: {text!r}")
    return is_right


def measure_saved(name: str, folder: Path, encoder: Encoder, pairs: np.ndarray) -> tuple[float, bool]:
    """Reload bf16 weights, compute in float32; return the share of exact sums and whether every line is right."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size_bytes = (folder / "model.safetensors").stat().st_size
    print(f"{name} {model.num_parameters():,} parameters, {size_bytes:,} bytes in {folder}")
    return report_sums(name, model, encoder, pairs), report_lines(name, model, encoder)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models/demo"), help="folder; the draft goes below it")
    parser.add_argument("--steps", type=int, help=f"steps of each model (default {MAIN.num_steps} and {DRAFT.num_steps})")
    parser.add_argument("--seed", type=int, default=0, help="seeds the split, the weights and the samples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another count gives slightly other weights")
    return parser.parse_args()


def main() -> int:
    """Train, save and measure both models; 1 when the main model as saved is below the bar or any line is wrong."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    folders = {"main": arguments.output, "draft": arguments.output / "draft"}
    for name, recipe in (("main", MAIN), ("draft", DRAFT)):
        recipe = replace(recipe, num_steps=arguments.steps or recipe.num_steps)
        save(train(name, recipe, encoder, arguments.seed), tokenizer, folders[name])
    pairs = Problems(arguments.seed).held_out()
    measured = {name: measure_saved(name, folder, encoder, pairs) for name, folder in folders.items()}
    is_good = measured["main"][0] >= REQUIRED_EXACT_SHARE and all(lines_right for _, lines_right in measured.values())
    if not is_good:
        print(f"FAILED: need {REQUIRED_EXACT_SHARE:.0%} exact sums from the main model and every line right", file=sys.stderr)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
