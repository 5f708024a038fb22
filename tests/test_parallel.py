"""Several processes over gloo against one: the same samples, losses, gradients, and runs that either goes on with."""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import parallel
import rloo
from sample import generate_shared
from tests.commands import RL, ROOT, SMALL, forked, lines, run, toy_checkpoint
from tests.toys import assert_close, toy_policy

PROMPTS = [[5, 17, 42], [9, 3], [1, 2, 3, 4, 5], [60, 60], [8]]


@dataclass
class Rank:
    """What torchrun tells a process."""

    rank: int
    size: int
    port: int

    def __call__(self) -> None:
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "WORLD_SIZE": str(self.size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}


def together(size: int, *command, cwd) -> str:
    """A command on `size` ranks; what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [str(Path(cwd) / f"rank{rank}") for rank in range(size)]
    processes = [forked(command, cwd, log, Rank(rank, size, port)) for rank, log in enumerate(logs)]
    for process in processes:
        process.join(120)
    said = "".join(Path(log + suffix).read_text() for log in logs for suffix in (".out", ".err"))
    assert [process.exitcode for process in processes] == [0] * size, said
    return said


def main() -> None:
    """What the ranks of the next test do."""
    policy, results = toy_policy(seed=2).double(), {}
    args = argparse.Namespace(micro_batch=2, kl_factor=1.0, draws=2, seed=3, beta=0.3, max_new_tokens=6)
    drawn = generate_shared(policy, PROMPTS, samples=2, max_new_tokens=6, eos_ids=range(0, 61, 7), seed=(4,),
                            first_row=6)
    results["samples"] = torch.tensor([[*r.token_ids, *[-1] * 6][:6] + [*r.depths, *[-1] * 6][:6] for r in drawn])

    def gradient(name):
        parallel.add_gradients(policy.trained().values())
        results.update({f"{name} {key}": p.grad.clone() for key, p in policy.trained().items()})
        policy.zero_grad()

    metrics = distill.train_step(policy, drawn, 1, args)
    results["metrics"] = torch.tensor([metrics["loss"], *metrics["hazard_target"], metrics["learned"]["exit_rate"]])
    gradient("stage 1")
    measured = distill.held_out(policy, drawn, 1.0, 0, 3)
    results["held out"] = torch.tensor([measured["token_kl"], *measured["learned"]["distribution"]])
    share = parallel.share(len(PROMPTS))
    mine, advantages = drawn[2 * share.start : 2 * share.stop], torch.arange(10.0).sin()
    base, _, _ = rloo.score_responses(policy, mine, args.micro_batch)
    rloo.accumulate_gradient(policy, mine, advantages[2 * share.start : 2 * share.stop], base, len(drawn), args)
    gradient("stage 2")
    if parallel.rank() == 0:
        save_file(results, sys.argv[1])


def test_ranks_draw_the_same_samples_and_add_up_to_the_same_gradients(tmp_path):
    """Else the number of GPUs changes what is learned: a mean of means, a sum that is missing, dice of a rank's own."""
    for size in (1, 2, 4):
        together(size, "tests.test_parallel", f"{size}.safetensors", cwd=tmp_path)
    alone, *others = (load_file(tmp_path / f"{size}.safetensors") for size in (1, 2, 4))
    assert len(alone["samples"].unique()) > 20 and (alone["samples"] < 0).any()
    for other in others:
        assert other.keys() == alone.keys()
        for name, value in alone.items():
            assert value.abs().sum() > 0
            assert_close(other[name], value, 1e-6 if name in ("metrics", "held out") else 1e-10)  # sums in float32


def test_a_run_of_two_processes_is_that_of_one_and_either_goes_on(tmp_path):
    """Else a run can't move to a machine with another number of GPUs, or two processes write one file."""
    toy_checkpoint(tmp_path / "toy")
    stage_1, stage_2 = ("distill.py", "--model", "toy", *SMALL), ("rloo.py", *RL, "--save-every", 1)
    run(*stage_1, "--out", "one", cwd=tmp_path)
    run(*stage_2, "--init", "one", "--out", "two", cwd=tmp_path)
    said = together(2, *stage_1, "--out", "one-by-2", cwd=tmp_path)
    assert said.count("held-out responses") == 1
    assert (tmp_path / "one-by-2" / "teacher.jsonl").read_text() == (tmp_path / "one" / "teacher.jsonl").read_text()
    for a, b in zip(*(lines(tmp_path / name / "metrics.jsonl") for name in ("one", "one-by-2")), strict=True):
        assert a["tokens"] == b["tokens"]
        assert_close(b["loss"], a["loss"], 1e-4)
    together(2, *stage_2, "--init", "one", "--out", "two-by-2", cwd=tmp_path)
    (a, *_), (b, *_) = (lines(tmp_path / name / "metrics.jsonl") for name in ("two", "two-by-2"))
    assert_close(*([x[name] for name in ("reward", "kl", "drift_mean", "grad_norm")] for x in (a, b)), 1e-4)
    both = [lines(tmp_path / name / "completions.jsonl")[:4] for name in ("two", "two-by-2")]
    assert [[row["token_ids"] for row in rows] for rows in both][0] == [row["token_ids"] for row in both[1]]
    assert [[row["sample"] for row in rows] for rows in both] == [[0, 1, 0, 1]] * 2

    together(2, "rloo.py", "--resume", "two-by-2", "--steps", 3, cwd=tmp_path)
    run("rloo.py", "--resume", "two-by-2", "--steps", 4, cwd=tmp_path)
    assert [row["step"] for row in lines(tmp_path / "two-by-2" / "metrics.jsonl")] == [0, 1, 2, 3]
    both = []
    for size in (1, 2):
        together(size, "evaluate.py", "one", "two", "--n", 3, "--out", f"eval-{size}", cwd=tmp_path)
        both.append(json.loads((tmp_path / f"eval-{size}" / "evaluation.json").read_text())["metrics"])
    assert both[0] == both[1]


@pytest.mark.parametrize("flags, naming", [
    (("--max-new-tokens", 4090), "--max-new-tokens 4090"), (("--responses-per-step", 1), "each of the 2 processes one"),
])
def test_under_torchrun_an_error_ends_all_processes_and_is_told_once(tmp_path, flags, naming):
    """Else one process waits for ever for another that is gone, or every process repeats it."""
    toy_checkpoint(tmp_path / "toy")
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / "distill.py"), "--model", "toy", *map(str, (*SMALL, *flags))],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode and time.monotonic() - begin < 100
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and naming in said[0], done.stderr
