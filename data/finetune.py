"""Teaches a pretrained model one of our generators, by full fine-tuning on responses with a chain of thought.

A small model may solve no task that the two stages could start from; this gives it one. It minimises the cross-entropy
of the response's tokens, in the format of the embedded model, on problems drawn afresh for every chunk of steps
(data/make_tiny.py, whose parts it uses), and writes a checkpoint that every script takes by --model.

    python -m data.finetune --model SMOLLM2 --out smollm2-arithmetic        goes on where it was stopped
"""

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import flags
import runs
from data import tasks
from data.hub import UserError, as_json, resolve, write_text
from data.make_tiny import CHUNK, THINKING, begin, collate, draw_chunk, load_state, save_state, save_weights
from data.text import OURS, Tokenizer
from exits import Policy, exit_depths
from model import Transformer
from sample import generate

NEW = 160  # tokens that a response may take
KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def refuse_other_ends(model: str) -> None:
    tokenizer = Tokenizer.from_pretrained(model)
    if tokenizer.encode("<|im_end|>") not in [[eos] for eos in tokenizer.eos_ids]:
        raise UserError(f"--model {model}: its responses don't end in <|im_end|>: use a ChatML checkpoint, as Qwen's")


def prepare(model: str, out: Path) -> Tokenizer:
    """All of the old checkpoint but the weights, with our chat template: a thinking mode, and no system prompt."""
    source = resolve(model)
    for name in KEPT:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    write_text(out / "chat_template.jinja", OURS)
    return Tokenizer.from_pretrained(str(out))


def response_loss(model: Transformer, batch: list) -> torch.Tensor:
    """Mean cross-entropy of the response's tokens. Only they are read out: most of a small model is its vocabulary."""
    ids, weight = collate(batch)
    picked = weight[:, 1:].flatten() > 0
    return F.cross_entropy(model.unembed(model.streams(ids[:, :-1])[picked]), ids[:, 1:].flatten()[picked])


def accuracy(model: Transformer, tokenizer: Tokenizer, task: str, n: int) -> float:
    """Of n held-out problems, with the chain of thought, at temperature 1."""
    problems = tasks.load(task, "test", n=n)
    policy = Policy(model.requires_grad_(False), exits=[1])
    responses = generate(policy, tasks.prompts(problems, tokenizer, True), max_new_tokens=NEW,
                         eos_ids=tokenizer.eos_ids, depths=policy.n_layers)
    return sum(runs.grade(p, r, tokenizer).strict for p, r in zip(problems, responses, strict=True)) / n


def main() -> None:
    p = flags.Parser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True, help="checkpoint folder or hub id, with a ChatML tokenizer")
    p.add_argument("--task", choices=("arithmetic", "stories"), default="arithmetic", help="the generator to teach "
                   "(default: arithmetic)")
    p.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint, and of the training's state")
    p.add_argument("--steps", type=flags.whole(1), default=320, help="in chunks of 16, each of which ends "
                   "with a checkpoint (default: 320)")
    p.add_argument("--batch-size", type=flags.whole(1), default=8, help="problems of a step (default: 8)")
    p.add_argument("--lr", type=flags.number(0, 1), default=5e-4, help="peak, after 20 steps of warm-up; then "
                   "linear to 0 (default: 5e-4)")
    p.add_argument("--n", type=flags.whole(1), default=100, help="held-out problems for the accuracy at the end "
                   "(default: 100)")
    args = p.parse_args()
    args.story_share, args.thinking_share = float(args.task == "stories"), THINKING

    refuse_other_ends(args.model)
    begin(args, free=("n", "out"))
    tokenizer = prepare(args.model, args.out)
    model = Transformer.from_pretrained(args.model).requires_grad_(True)
    exit_depths(model.config.num_hidden_layers)  # refuses a model without exits, which none of the scripts would take
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    state = args.out / "state.safetensors"
    step = load_state(state, model, [optimizer]) if state.exists() else 0
    with tqdm(total=args.steps, initial=step) as bar:
        while step < args.steps:
            rows = []
            for batch in draw_chunk(tokenizer, step // CHUNK, args):
                loss = response_loss(model, batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.param_groups[0]["lr"] = args.lr * max(0, min((step + 1) / 20, 1 - step / args.steps))
                optimizer.step()
                optimizer.zero_grad()
                rows.append({"step": step, "loss": loss.item()})
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
                step += 1
            save_weights(args.out, model)
            save_state(state, model, [optimizer], step)
            with open(args.out / "metrics.jsonl", "a") as file:
                file.writelines(map(as_json, rows))
    print(f"{accuracy(model, tokenizer, args.task, args.n):.0%} of {args.n} held-out problems right at temperature 1")
    print(f"next: python distill.py --model {args.out} --task {args.task} --max-new-tokens {NEW}")


if __name__ == "__main__":
    runs.run_main(main)
