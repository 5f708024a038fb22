"""Trains the embedded model `data/tiny` from scratch on our own generators: tokenizer, weights, config.

It minimises next-token cross-entropy over the response (and, more lightly, the prompt) of arithmetic problems and
Sally-Anne stories, 65% with the gold chain of thought and 35% answered at once after an empty think block. Problems
are drawn afresh for every chunk of steps from a seed that is the chunk's number, so a resumed run sees what an
unbroken one would have seen. Left out: packing (rows of like length are batched instead), dropout, weight averaging.

    python -m data.make_tiny --out runs/tiny        # one CPU thread: about 75 minutes, 1.5 GB; run again to resume
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import jinja2
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data import arithmetic, stories
from model import Cache, Config, Transformer

FAMILIES = {"arithmetic": arithmetic, "stories": stories}
MAX_VOCAB = 512
THINKING = 0.7  # share of problems answered with a chain of thought
CHUNK = 16  # batches drawn together, so that rows of like length can share a batch
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 476, "hidden_size": 128,
    "intermediate_size": 320, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False,
    "tie_word_embeddings": True, "max_position_embeddings": 2048, "torch_dtype": "float32",
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}
# Qwen's own splitting rule: single digits, newline runs on their own, a blank joined to the word behind it.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
PROMPT = jinja2.Template(TEMPLATE)


def render(question: str, thinking: bool) -> str:
    messages = [{"role": "user", "content": question}]
    return PROMPT.render(messages=messages, add_generation_prompt=True, enable_thinking=thinking)


def response(problem: dict, thinking: bool) -> str:
    thought = f"<think>\n{problem['cot']}\n</think>\n\n" if thinking else ""
    return f"{thought}{problem['answer_line']}<|im_end|>"


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over generator text: all 256 bytes, then the commonest words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=MAX_VOCAB - 2, special_tokens=special, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    problems = [p for family in FAMILIES.values() for p in family.problems("train", 2000)]
    tokenizer.train_from_iterator(
        [text for p in problems for text in (f"user\n{p['question']}", f"assistant\n{p['cot']}\n\n{p['answer_line']}")],
        trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer


def encode(tokenizer: Tokenizer, problem: dict, thinking: bool) -> tuple[list[int], int]:
    """Token ids of prompt and response, and the prompt's length."""
    prompt = tokenizer.encode(render(problem["question"], thinking)).ids
    return prompt + tokenizer.encode(response(problem, thinking)).ids, len(prompt)


def draw_chunk(tokenizer: Tokenizer, seed: int, args) -> list[list[tuple[list[int], int]]]:
    """CHUNK batches of (ids, prompt length), rows of like length together, in random order."""
    rng, rows = random.Random(seed), []
    for _ in range(CHUNK * args.batch_size):
        family = stories if rng.random() < args.story_share else arithmetic
        rows.append(encode(tokenizer, family.make(rng, "train"), rng.random() < THINKING))
    rows.sort(key=lambda row: len(row[0]))
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    rng.shuffle(batches)
    return batches


def collate(batch, prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and the weight (B, T) of each token as a target."""
    T = max(len(ids) for ids, _ in batch)
    ids, weight = torch.zeros(len(batch), T, dtype=torch.long), torch.zeros(len(batch), T)
    for b, (row, prompt) in enumerate(batch):
        ids[b, : len(row)] = torch.tensor(row)
        weight[b, 1:prompt], weight[b, prompt : len(row)] = prompt_weight, 1.0
    return ids, weight


def initialise(model: Transformer) -> None:
    """Normal with std D^-1/2, smaller where a block writes to the stream, so that depth doesn't blow it up."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 if "embed" in name else p.shape[1] ** -0.5
            out = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=std / math.sqrt(2 * CONFIG["num_hidden_layers"]) if out else std)


def learning_rate(step: int, steps: int) -> float:
    """Factor on the peak rate: 100 steps of warm-up, then a cosine to 5%."""
    return min(1, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def respond(model: Transformer, prompts: list[list[int]], temperature: float, limit: int = 120) -> list[list[int]]:
    lengths = torch.tensor([len(p) for p in prompts])
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)] = torch.tensor(prompt)
    cache = Cache(model.config, len(prompts), ids.shape[1] + limit, model.lm_head.weight)
    h = model.stream(ids, cache=cache)[torch.arange(len(prompts)), lengths - 1]
    cache.fill(lengths.clone(), int(max(lengths)))
    out = []
    for _ in range(limit):
        logits = model.unembed(h)
        token = (logits / temperature).softmax(-1).multinomial(1)[:, 0] if temperature else logits.argmax(-1)
        out.append(token)
        if all((torch.stack(out) == CONFIG["eos_token_id"]).any(0)):
            break
        h = model.stream(token[:, None], cache=cache)[:, 0]
        cache.fill(cache.length + 1, cache.longest + 1)
    return torch.stack(out, 1).tolist()


def accuracy(model, tokenizer, problems: list[dict], thinking: bool, temperature: float = 0.0) -> list[bool]:
    """Which problems are answered exactly: the whole text after the think block, and nothing behind it."""
    prompts = [tokenizer.encode(render(p["question"], thinking)).ids for p in problems]
    right = []
    for problem, ids in zip(problems, respond(model, prompts, temperature)):
        text = tokenizer.decode(ids, skip_special_tokens=False).split("<|im_end|>")[0]
        right.append(text.split("</think>")[-1].strip() == problem["answer_line"])
    return right


def evaluate(model, tokenizer, n: int) -> dict:
    scores = {}
    for family, module in FAMILIES.items():
        problems = module.problems("test", n)
        for mode, thinking, temperature in (("think", True, 0.0), ("think_t1", True, 1.0), ("direct", False, 0.0)):
            right = accuracy(model, tokenizer, problems, thinking, temperature)
            scores[f"{family}_{mode}"] = sum(right) / n
            if mode == "think":
                for kind in sorted({p["kind"] for p in problems}):
                    of_kind = [r for r, p in zip(right, problems) if p["kind"] == kind]
                    scores[f"{family}_{mode}_{kind.replace(' ', '_')}"] = round(sum(of_kind) / len(of_kind), 3)
    return scores
