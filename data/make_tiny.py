"""Trains the embedded model `data/tiny` from scratch on our own generators: tokenizer, weights, config.

It minimises the cross-entropy of the response's tokens to arithmetic problems and Sally-Anne stories, 75% of
them with the gold chain of thought and 25% answered at once after an empty think block. Problems are drawn
afresh for every chunk of steps, seeded by the chunk's number, so a resumed run sees what an unbroken one
would have seen. A CPU that only emulates bfloat16 (lscpu shows no avx512_bf16) takes several times as long: Muon's
step alone 1.2 s there for 0.5 s of forward and backward pass. Left out: packing (rows of like length share a batch
instead), dropout, a curriculum.

    python -m data.make_tiny --out runs/tiny --compile    # one CPU thread: half an hour; run again to resume
    python -m data.make_tiny --out runs/direct --init data/tiny --story-share 1 --thinking-share 0.25
                                                          # goes on from data/tiny, so that it answers without a chain
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer
from tqdm import tqdm

import flags
import runs
from checkpoints import write_tensors
from data import arithmetic, stories, tasks
from data.hub import UserError, as_json, read_json, write_json
from data.text import OURS, Tokenizer
from data.weights import config_fields
from exits import Policy
from model import Config, Transformer
from sample import generate

FAMILIES = {"arithmetic": arithmetic, "stories": stories}
THINKING = 0.75  # share of problems answered with a chain of thought, by default
MODES = [("think", True, 0.0), ("think_t1", True, 1.0), ("direct", False, 0.0), ("direct_t1", False, 1.0)]
CHUNK = 16  # batches drawn together, so that rows of like length can share a batch
SAVE_EVERY = 256  # steps
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 128,
    "intermediate_size": 320, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "attention_bias": False, "tie_word_embeddings": True, "max_position_embeddings": 2048,
    "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}
# Qwen's own splitting rule: single digits, newline runs on their own, a blank joined to the word behind it.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def make_tokenizer(folder: Path) -> Tokenizer:
    """Byte-level BPE over generator text: all 256 bytes, and every word of the generators as one token."""
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    problems = [p for family in FAMILIES.values() for p in arithmetic.distinct(family.make, "train", 2000)]
    bpe.train_from_iterator([text for p in problems for text in (
        f"user\n{p['question']}", f"assistant\n{p['cot']}\n", f"\n\n{p['answer_line']}")], trainer)
    bpe.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])

    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"], "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None, "chat_template": OURS})
    write_json(folder / "config.json", CONFIG | {"vocab_size": bpe.get_vocab_size()})
    write_json(folder / "generation_config.json",
               {"eos_token_id": 2, "pad_token_id": 0, "do_sample": True, "temperature": 1.0})
    return Tokenizer.from_pretrained(str(folder))


def encode(tokenizer: Tokenizer, problems: list[dict], thinking: bool) -> list[tuple[list[int], int]]:
    """Token ids of prompt and response of each problem, and the prompt's length."""
    prompts = tokenizer.prompts([[{"role": "user", "content": p["question"]}] for p in problems], thinking)
    thoughts = [f"<think>\n{p['cot']}\n</think>\n\n" if thinking else "" for p in problems]
    return [(prompt + tokenizer.encode(f"{thought}{p['answer_line']}<|im_end|>"), len(prompt))
            for prompt, thought, p in zip(prompts, thoughts, problems, strict=True)]


def draw_chunk(tokenizer: Tokenizer, seed: int, args) -> list[list[tuple[list[int], int]]]:
    """CHUNK batches of (ids, prompt length), rows of like length together, in random order."""
    rng, drawn = random.Random(seed), []
    for _ in range(CHUNK * args.batch_size):
        family = stories if rng.random() < args.story_share else arithmetic
        drawn.append((family.make(rng, "train"), rng.random() < args.thinking_share))
    encoded = {mode: iter(encode(tokenizer, [p for p, thinking in drawn if thinking == mode], mode))
               for mode in (True, False)}
    rows = [next(encoded[thinking]) for _, thinking in drawn]
    rows.sort(key=lambda row: len(row[0]))
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    rng.shuffle(batches)
    return batches


def collate(batch: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and which of them (B, T) are targets: the response and its end."""
    T = max(len(ids) for ids, _ in batch)
    ids, weight = torch.zeros(len(batch), T, dtype=torch.long), torch.zeros(len(batch), T)
    for b, (row, prompt) in enumerate(batch):
        ids[b, : len(row)] = torch.tensor(row)
        weight[b, prompt : len(row)] = 1.0
    return ids, weight


def initialise(model: Transformer) -> None:
    """Normal with std 1 / sqrt(inputs), embeddings 0.02; smaller where a block writes to the stream, so that depth
    doesn't swell it."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 if "embed" in name else p.shape[1] ** -0.5
            out = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=std / math.sqrt(2 * CONFIG["num_hidden_layers"]) if out else std)


def learning_rate(step: int, steps: int) -> float:
    """Factor on the peak rate: 100 steps of warm-up, flat, then linear to zero over the last 60%.

    Flat rather than cosine, so that a running training can still be given more or fewer steps.
    """
    return max(0, min(1, (step + 1) / 100, (steps - step) / (0.6 * steps)))


def make_optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embedding and gains: fewer steps than AdamW alone (tiny/README.md)."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
                  torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def begin(args, free: tuple[str, ...]) -> None:
    """Makes the folder; refuses another's, and to go on under other flags than it was begun with, but the free ones."""
    path, mine = args.out / "flags.json", {name: str(value) for name, value in vars(args).items() if name not in free}
    if not path.exists():
        if args.out.exists() and any(args.out.iterdir()):
            raise UserError(f"--out {args.out} exists and was not made by this script: choose a new folder")
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(path, mine)
    for name, was in read_json(path).items():
        if mine.get(name) != was:
            raise UserError(f"--out {args.out} was begun with --{flags.flag(name)} {was}, not {mine.get(name)}: give "
                            f"that, or choose another --out")


def save_state(path: Path, model: Transformer, optimizers: list, step: int) -> None:
    """Weights, optimizer moments and the step in one safetensors file, replaced in one go."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    for o, optimizer in enumerate(optimizers):
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            tensors |= {f"optimizer.{o}.{i}.{key}": value for key, value in optimizer.state[p].items()}
    write_tensors(tensors, path.with_suffix(".part"), step=str(step))
    path.with_suffix(".part").replace(path)


def load_state(path: Path, model: Transformer, optimizers: list) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            for name, p in model.named_parameters():
                p.data.copy_(file.get_tensor(f"model.{name}"))
            for name in (name for name in file.keys() if name.startswith("optimizer.")):
                _, o, i, key = name.split(".")
                p = optimizers[int(o)].param_groups[0]["params"][int(i)]
                optimizers[int(o)].state[p][key] = file.get_tensor(name)
            return int(file.metadata()["step"])
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or truncated ({error}): choose another --out, or delete it to begin "
                        f"anew") from None


def save_weights(folder: Path, model: Transformer) -> None:
    """In Hugging Face layout, float32."""
    write_tensors(dict(model.named_parameters()), folder / "model.part")  # which name a tied head once
    (folder / "model.part").replace(folder / "model.safetensors")


def evaluate(folder: Path, tokenizer: Tokenizer, n: int) -> dict:
    """Held-out accuracy of the saved checkpoint: by family and mode, by kind of problem when it thinks."""
    policy, scores = Policy(Transformer.from_pretrained(folder), exits=[1]), {}
    for family, module in FAMILIES.items():
        problems = tasks.load(family, "test", n=n)
        for mode, thinking, temperature in MODES:
            prompts = tasks.prompts(problems, tokenizer, thinking)
            out = generate(policy, prompts, max_new_tokens=120, eos_ids=tokenizer.eos_ids,
                           temperature=temperature, depths=policy.n_layers)
            right = [runs.grade(p, r, tokenizer).strict for p, r in zip(problems, out, strict=True)]
            scores[f"{family}_{mode}"] = sum(right) / n
            if mode == "think":
                kinds = [p["kind"] for p in arithmetic.distinct(module.make, "test", n)]
                for kind in sorted(set(kinds)):
                    hits = [r for r, k in zip(right, kinds, strict=True) if k == kind]
                    scores[f"{family}_{kind.replace(' ', '_')}"] = sum(hits) / len(hits)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="training state, resumed if it exists, and model/")
    parser.add_argument("--steps", type=int, default=2560, help="(default: 2560)")
    parser.add_argument("--batch-size", type=int, default=32, help="problems of a step (default: 32)")
    parser.add_argument("--story-share", type=float, default=0.55, help="share of stories, the longer texts "
                        "(default: 0.55)")
    parser.add_argument("--thinking-share", type=float, default=THINKING, help="share answered with a "
                        "chain of thought (default: %(default)s)")
    parser.add_argument("--init", type=Path, help="checkpoint to go on from, at half the rate, on problems of its own")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    args = parser.parse_args()
    begin(args, free=("out", "steps", "compile"))
    export = args.out / "model"  # and not data/tiny, which would be gone at the first step

    # Model, optimizers, and where the last run stopped
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(export)
    if args.init:
        model = Transformer.from_pretrained(args.init).requires_grad_(True)
    else:
        model = Transformer(Config(**config_fields(read_json(export / "config.json"))))
        initialise(model)
    optimizers, rate, seed = make_optimizers(model), 0.5 if args.init else 1.0, 10**6 if args.init else 0
    state = args.out / "state.safetensors"
    step = load_state(state, model, optimizers) if state.exists() else 0

    for block in model.model.layers if args.compile else ():
        block.compile(dynamic=True)

    # Train
    clock, losses, tokens = time.time(), [], 0
    bar = tqdm(total=args.steps, initial=step)
    while step < args.steps:
        for batch in draw_chunk(tokenizer, seed + step // CHUNK, args):
            ids, weight = collate(batch)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (loss * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["peak"] * learning_rate(step, args.steps)
                optimizer.step()
                optimizer.zero_grad()
            step, tokens = step + 1, tokens + sum(len(row) for row, _ in batch)
            losses.append(loss.item())
            bar.update()

        if step % SAVE_EVERY == 0 or step >= args.steps:
            save_state(state, model, optimizers, step)
            save_weights(export, model)
            row = as_json({"step": step, "loss": sum(losses) / len(losses),
                           "tokens_per_s": tokens / (time.time() - clock), **evaluate(export, tokenizer, 50)})
            with open(args.out / "metrics.jsonl", "a") as file:
                file.write(row)
            bar.write(row, end="")
            clock, losses, tokens = time.time(), [], 0


if __name__ == "__main__":
    runs.run_main(main)
