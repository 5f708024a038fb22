"""What the three scripts share around the method: common flags, run folders, checkpoints, metrics.

A run is a folder:
    config.json      the flags, the model's revision and the library versions
    metrics.jsonl    one line a step
    step-000100/     a checkpoint: adapter and exit heads, optimizer, state.json; renamed into place when whole
    complete.json    written last: only a run that has it counts as complete
Every random number is derived from (seed, step, row, position), so that a resumed run needs no generator state.
"""

import argparse
import json
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from data import tasks
from data.hub import UserError, read_json
from data.text import Tokenizer
from exits import Policy, fill, load_policy, save_policy, write_json
from model import Transformer

EMBEDDED = str(Path(__file__).parent / "data" / "tiny")
RUNS = Path("runs")
KEEP = 2  # checkpoints a run keeps
MAX_SKIPPED = 5  # steps in a row with a gradient that isn't finite before a run gives up


# ------------------------------------------------------------------------------------------------------- flags


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags of all three scripts. Where help says 'A / B', A is for the embedded model and B for any other."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="checkpoint folder or hub id (default: the embedded one; after stage 1, its model)")
    p.add_argument("--revision", help="branch, tag or commit of a hub model")
    p.add_argument("--task", choices=tasks.TASKS, help="arithmetic / gsm8k; after stage 1, its task and --data, "
                   "--thinking and --max-new-tokens")
    p.add_argument("--data", help="local file or folder with the task's data (default: made here, or from the hub)")
    p.add_argument("--thinking", action=argparse.BooleanOptionalAction,
                   help="the chat template's thinking mode (default: on)")
    p.add_argument("--max-new-tokens", type=int, help="160 / 2048; longer responses are cut and count as unfinished")
    p.add_argument("--rows", type=int, help="responses sampled at a time, 256 / what fits in half of the free "
                   "memory; each holds a K/V cache")
    p.add_argument("--micro-batch", type=int, help="sequences in one training pass, 64 / 1: memory, not results")
    p.add_argument("--recompute", action=argparse.BooleanOptionalAction,
                   help="activation checkpointing, off / on: far less memory, a third more work in the update")
    p.add_argument("--compile", action="store_true", help="torch.compile the MLPs: slower in float32 on a CPU, not yet "
                   "measured on CUDA")
    p.add_argument("--cuda-graphs", action="store_true", help="decode by CUDA graphs: fewer launches, not yet measured")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base; bfloat16 on CUDA, else float32")
    p.add_argument("--out", help="the run's folder (default: runs/STAGE-TIME)")
    return p


def inherit(args: argparse.Namespace, run: Path) -> None:
    """Fills the flags left open that say what a stage-1 run was about; what follows it should be about the same."""
    before = argparse.Namespace(**read_config(run)["args"])
    if args.model not in (None, before.model):
        raise UserError(f"--model {args.model}, but {run} was trained on {before.model}: leave --model out")
    if args.task not in (None, before.task):
        before.data = None
    for name in ("model", "revision", "task", "data", "thinking", "max_new_tokens"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(before, name))


def settle(args: argparse.Namespace, **defaults) -> argparse.Namespace:
    """Fills the flags left open with the value for the embedded model (first of each pair) or any other (second)."""
    args.model = args.model or EMBEDDED
    defaults |= {"task": ("arithmetic", "gsm8k"), "thinking": (True, True), "max_new_tokens": (160, 2048),
                 "rows": (256, None), "micro_batch": (64, 1), "recompute": (False, True)}
    for name, pair in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, pair[args.model != EMBEDDED])
    for name in ("steps", "batch_size", "rows", "micro_batch", "max_new_tokens", "rank", "n"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.cuda_graphs and not args.device.startswith("cuda"):
        raise UserError(f"--cuda-graphs with --device {args.device}: only CUDA has them; leave the flag out")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def run_main(main) -> None:
    """Runs a script's main: a bad input ends in one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


# --------------------------------------------------------------------------------------------- models and prompts


def load_model(args) -> tuple[Transformer, Tokenizer]:
    torch.manual_seed(args.seed)  # LoRA's start
    model = Transformer.from_pretrained(args.model, args.revision, getattr(torch, args.dtype), args.device)
    model.recompute, model.graphs = args.recompute, args.cuda_graphs
    if args.compile:
        for block in model.model.layers:
            block.mlp.compile(dynamic=True)  # compiled when first called, adapters and all
    return model, Tokenizer.from_pretrained(args.model, args.revision)


def prompt_ids(problems, tokenizer: Tokenizer, thinking: bool) -> list[list[int]]:
    return [tokenizer.prompt_ids(problem.messages, enable_thinking=thinking) for problem in problems]


def grade(problem, prompt: list[int], response: list[int], finished: bool, tokenizer: Tokenizer):
    """The task's grade of a sampled response."""
    text = tokenizer.decode(response[:-1] if finished else response)  # without its eos
    return problem.grade(text, finished, think_open=tokenizer.think_open(prompt))


def pick(count: int, size: int, step: int, seed: int) -> list[int]:
    """The step's `size` indices out of 0..count-1: a fresh shuffle every epoch, without replacement inside one."""
    wanted = range(step * size, (step + 1) * size)
    return [int(np.random.default_rng([seed, i // count]).permutation(count)[i % count]) for i in wanted]


def warn_unfinished(share_finished: float, args) -> None:
    if share_finished < 0.8:
        bar = "!" * 100
        print(f"{bar}\n{1 - share_finished:.0%} of the responses are unfinished at --max-new-tokens "
              f"{args.max_new_tokens}: they count as wrong.\nRaise it, or pass --no-thinking for shorter ones.\n{bar}",
              file=sys.stderr)


# ------------------------------------------------------------------------------------------------- run folders


class Run:
    """One run's folder: what is written there, and how it is picked up again."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args, self.skipped = folder, args, 0

    @classmethod
    def start(cls, stage: str, args: argparse.Namespace, model: Transformer) -> "Run":
        folder = Path(args.out) if args.out else RUNS / f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not empty: choose another --out, or --resume {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        config = {"stage": stage, "args": vars(args), "revision": model.revision,
                  "versions": {name: version(name) for name in ("torch", "safetensors", "tokenizers")}}
        write_json(folder / "config.json", config)
        return cls(folder, args)

    @classmethod
    def resume(cls, args: argparse.Namespace, stage: str) -> "Run":
        """The interrupted run in args.resume, under the flags it was started with."""
        folder = Path(args.resume)
        config = read_config(folder)
        if config["stage"] != stage:
            raise UserError(f"{folder} is a run of {config['stage']}.py, not of {stage}.py")
        if (folder / "complete.json").exists():
            raise UserError(f"{folder} is complete: there is nothing to resume")
        if absent := sorted(vars(args).keys() - config["args"].keys()):
            raise UserError(f"{folder} was started by an earlier version, without --{absent[0].replace('_', '-')}: "
                            f"start a new run")
        return cls(folder, argparse.Namespace(**config["args"]))

    def log(self, name: str, records: list[dict]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def rewind(self, step: int) -> None:
        """Drops what the logs hold of steps that are about to be run again."""
        for name in ("metrics.jsonl", "completions.jsonl"):
            if (path := self.folder / name).exists():
                lines = [line for line in path.read_text("utf-8").splitlines(True) if line.endswith("\n")]
                write_text(path, "".join(line for line in lines if json.loads(line)["step"] < step))

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint after `step` steps; a kill at any moment leaves the previous one in force."""
        partial = self.folder / f".partial-{step:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_policy(policy, partial)
        save_file(moments(policy, optimizer), partial / "optimizer.safetensors")
        write_json(partial / "state.json", {"step": step})
        final = self.folder / f"step-{step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in sorted(self.folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)

    def load(self, model: Transformer) -> tuple[Policy, int]:
        folder = checkpoint(self.folder)
        return load_policy(model, folder), read_json(folder / "state.json")["step"]

    def apply_gradients(self, optimizer, lr: float) -> float:
        """Clips the gradient to norm 1 and steps. One that isn't finite is dropped; a few in a row end the run."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
        self.skipped = 0 if np.isfinite(norm) else self.skipped + 1
        if self.skipped == MAX_SKIPPED:
            raise UserError(f"{MAX_SKIPPED} gradients in a row were not finite; the last good checkpoint is in "
                            f"{self.folder}; lower --lr or use --dtype float32")
        if not self.skipped:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def complete(self, summary: dict) -> None:
        write_text(self.folder / "complete.json", json.dumps(summary, indent=2) + "\n")


def begin(run: Run | None, stage: str, args, model: Transformer, fresh):
    """The run with its policy, optimizer and next step: a resumed one where it stopped, else a new one of fresh()."""
    if run and any(run.folder.glob("step-*")):
        policy, start = run.load(model)
        optimizer = adamw(policy, checkpoint(run.folder))
    else:
        policy, start = fresh(), 0
        optimizer = adamw(policy)
    run = run or Run.start(stage, args, model)
    run.rewind(start)
    return run, policy, optimizer, start


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def adamw(policy: Policy, folder: Path | None = None) -> torch.optim.AdamW:
    """The optimizer over adapters and heads; with a checkpoint's folder, in the state it was in."""
    optimizer = torch.optim.AdamW(policy.trained().values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    if folder is not None:
        for p in policy.trained().values():
            optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
        fill(moments(policy, optimizer), folder / "optimizer.safetensors")
    return optimizer


def moments(policy: Policy, optimizer) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, p in policy.trained().items()
            for key, value in optimizer.state[p].items()}


def read_config(run: Path) -> dict:
    """What a run was started with: stage, args, revision, versions."""
    config = read_json(Path(run) / "config.json")
    if "stage" not in config or "args" not in config:
        raise UserError(f"{run} is not a run of distill.py or rloo.py: give the folder that one of them wrote")
    return config


def checkpoint(run: Path) -> Path:
    """A run's newest checkpoint."""
    found = sorted(Path(run).glob("step-*"))
    if not found:
        raise UserError(f"{run}: no checkpoint there; give the folder of a run of distill.py or rloo.py")
    return found[-1]


def newest(*stages: str, model: str | None = None) -> Path | None:
    """The complete run that ended last among runs/*, of one of the stages and, if given, of that model."""
    found = []
    for done in RUNS.glob("*/complete.json"):
        config = read_config(done.parent)
        if config["stage"] in stages and model in (None, config["args"]["model"]):
            found.append((done.stat().st_mtime, done.parent))
    return max(found)[1] if found else None
