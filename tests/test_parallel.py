"""Several processes over gloo against one: the same samples, losses, gradients; any number goes on with a run."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import distill
import flags
import parallel
import rloo
from data.hub import UserError
from sample import generate_shared
from tests.commands import RL, ROOT, SMALL, forked, lines, run, toy_checkpoint
from tests.toys import assert_close, toy_policy

PROMPTS = [[5, 17, 42], [9, 3], [1, 2, 3]]  # fewer than the most ranks


def as_rank(rank: int, size: int, port: int, harm) -> None:
    """What torchrun tells a process, and what the last one does to itself."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if harm and rank == size - 1:
        harm()


def interrupted() -> None:
    """Ctrl-C in step 1."""
    step = distill.train_step

    def train_step(policy, responses, number, *args):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(policy, responses, number, *args)

    distill.train_step = train_step


def broken() -> None:
    """An error that is nobody's fault but ours, in step 1."""
    step = distill.train_step
    distill.train_step = lambda policy, responses, number, *args: 1 // (1 - number) and step(policy, responses, number,
                                                                                             *args)


def together(size: int, *command, cwd, codes=(0,), harm=None) -> str:
    """A command on `size` ranks; what they print. All end with one of the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [str(Path(cwd) / f"rank{rank}") for rank in range(size)]
    processes = [forked(command, cwd, log, partial(as_rank, rank, size, port, harm)) for rank, log in enumerate(logs)]
    for process in processes:
        process.join(180)
    ended = [process.exitcode for process in processes]  # None: it hangs
    for process in processes:
        process.kill()
    said = "".join(Path(log + suffix).read_text() for log in logs for suffix in (".out", ".err"))
    assert set(ended) <= set(codes), f"{ended}\n{said}"
    return said


def samples_of(drawn: list) -> torch.Tensor:
    """Tokens and depths of responses of at most six tokens."""
    return torch.tensor([[*r.token_ids, *[-1] * 6][:6] + [*r.depths, *[-1] * 6][:6] for r in drawn])


def stage_2(policy, mine: list, share: slice, micro_batch: int) -> torch.Tensor:
    """A rank's part of stage 2's gradient, of two samples to each prompt; their mean KL."""
    parts, mean_kl, _ = rloo.score_responses(policy, mine, micro_batch)
    advantages = torch.arange(6.0, dtype=torch.double).sin()[2 * share.start : 2 * share.stop]
    rloo.accumulate_gradient(policy, parts, advantages, 0.3, 6, 2 * len(PROMPTS))
    return mean_kl


def add_gradient(policy, results: dict, name: str) -> None:
    """Notes the gradient of all ranks together."""
    parallel.add_gradients(policy.trained().values())
    results.update({f"{name} {key}": p.grad.clone() for key, p in policy.trained().items()})


@parallel.shared
def main() -> None:
    """What the ranks of the next test do."""
    policy, results = toy_policy(seed=2).double(), {}
    drawn = generate_shared(policy, PROMPTS, samples=2, max_new_tokens=6, eos_ids=range(0, 61, 7), seed=(4,),
                            first_response=6)
    results["samples"] = samples_of(drawn)

    def gradient(name):
        add_gradient(policy, results, name)
        policy.zero_grad()

    of_three = drawn[::3]  # so that the fourth rank has none
    metrics = distill.train_step(policy, of_three, 1, 1.0, 3, 2)
    figures = [metrics["loss"], metrics["target"]["layer_savings"], metrics["learned"]["exit_rate"]]
    gradient("stage 1")
    measured = distill.held_out(policy, of_three, 1.0, 0, 3)
    figures += [measured["token_kl"], measured["intact"], measured["learned"]["exit_rate"]]
    results["figures"] = torch.tensor(figures, dtype=torch.double)
    share = parallel.share(len(PROMPTS))
    mean_kl = stage_2(policy, drawn[2 * share.start : 2 * share.stop], share, micro_batch=2)
    gradient("stage 2")
    results["kl"] = torch.tensor(parallel.all_gather(mean_kl.tolist()), dtype=torch.double)
    if parallel.rank() == 0:
        save_file(results, sys.argv[1])


def test_ranks_draw_the_same_samples_and_add_up_to_the_same_gradients(tmp_path):
    """Else the number of GPUs changes what is learned: a mean of means, a sum that is missing, dice of a rank's own, or
    a rank without a prompt that the others wait for."""
    for size in (1, 2, 4):
        together(size, "tests.test_parallel", f"{size}.safetensors", cwd=tmp_path)
    alone, *others = (load_file(tmp_path / f"{size}.safetensors") for size in (1, 2, 4))
    assert len(alone["samples"].unique()) > 12 and (alone["samples"] < 0).any()
    for other in others:
        assert other.keys() == alone.keys() and torch.equal(other["samples"], alone["samples"])
        for name, value in alone.items():
            assert value.abs().sum() > 0
            assert_close(other[name], value, 1e-10)


def test_a_run_of_two_processes_is_that_of_one_and_one_or_four_go_on(tmp_path):
    """Else a run can't move to a machine with another number of GPUs, or two processes write one file."""
    toy_checkpoint(tmp_path / "toy")
    stage_1, stage_2 = ("distill.py", "--model", "toy", *SMALL), ("rloo.py", *RL, "--init", "one", "--save-every", 1)
    run(*stage_1, "--out", "one", cwd=tmp_path)
    said = together(2, *stage_1, "--out", "one-by-2", cwd=tmp_path)
    assert said.count("held-out responses") == said.count("next: python rloo.py") == 1
    assert (tmp_path / "one-by-2" / "teacher.jsonl").read_text() == (tmp_path / "one" / "teacher.jsonl").read_text()

    run(*stage_2, "--out", "two", cwd=tmp_path)
    run("rloo.py", "--resume", "two", "--steps", 3, cwd=tmp_path)
    together(2, *stage_2, "--out", "two-by-2", cwd=tmp_path)
    together(4, "rloo.py", "--resume", "two-by-2", "--steps", 3, cwd=tmp_path)  # of which two have no prompt
    for kind, names in (("one", ("loss", "tokens", "grad_norm")), ("two", ("reward", "kl", "length", "grad_norm"))):
        alone, others = (lines(tmp_path / name / "metrics.jsonl") for name in (kind, f"{kind}-by-2"))
        assert_close(*([[row[name] for name in ("step", *names)] for row in rows] for rows in (alone, others)), 1e-4)
    alone, others = (lines(tmp_path / name / "completions.jsonl") for name in ("two", "two-by-2"))
    for name in ("step", "id", "sample", "token_ids", "depths"):
        assert [row[name] for row in alone] == [row[name] for row in others]
    run("rloo.py", "--resume", "two-by-2", "--steps", 4, cwd=tmp_path)

    run("evaluate.py", "one", "two", "--n", 3, "--out", "eval-1", cwd=tmp_path)
    together(2, "evaluate.py", "one", "two", "--n", 3, "--out", "eval-2", cwd=tmp_path)
    alone, others = (lines(tmp_path / f"eval-{size}" / "completions.jsonl") for size in (1, 2))
    assert [row["token_ids"] for row in alone] == [row["token_ids"] for row in others]


def test_an_interrupt_of_one_process_ends_all_after_the_same_step_and_saves_it(tmp_path):
    """Else they wait for the one that is gone, and the step is lost."""
    toy_checkpoint(tmp_path / "toy")
    said = together(2, "distill.py", "--model", "toy", *SMALL, "--steps", 9, "--out", "run", cwd=tmp_path,
                    codes=[128 + signal.SIGINT], harm=interrupted)
    assert said.count("stopped; python distill.py --resume run goes on") == 1
    assert (tmp_path / "run" / "step-000002").is_dir() and len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_fault_in_one_process_ends_all_and_is_told_once(tmp_path):
    """Else the others wait for hours, or their broken connections bury what went wrong."""
    toy_checkpoint(tmp_path / "toy")
    said = together(2, "distill.py", "--model", "toy", *SMALL, cwd=tmp_path, codes=[1], harm=broken)
    assert said.count("Traceback") == said.count("ZeroDivisionError") == 1


def test_a_script_that_can_not_share_its_work_refuses_several_processes(tmp_path):
    """Else every process does all of it, and they write one another's files."""
    said = together(2, "monitor.py", "base", cwd=tmp_path, codes=(1, 2))  # 1: the other ended while it was connecting
    assert said.count("without torchrun") == 1 == said.count("error: ")


@pytest.mark.parametrize("device, naming", [("cuda:1", "a GPU of its own"), ("cuda", "2 processes here and 1 GPUs")])
def test_processes_that_would_share_a_gpu_are_refused(device, naming, monkeypatch):
    """Else NCCL says so, late and in its own words."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=naming):
        flags.check_device(argparse.Namespace(device=device, shard=False, cuda_graphs=False))


def test_what_lies_on_the_cpu_is_summed_beside_gpus_too(monkeypatch):
    """Left to itself torch takes the accelerator's backend alone, and several GPUs end in an error at the first sum on
    the host. Here gloo stands in for NCCL, in a group of one that takes itself for two."""
    real, store = dist.init_process_group, dist.HashStore()
    monkeypatch.setattr(dist, "init_process_group", lambda backend=None, **_: real(
        backend and backend.replace("nccl", "gloo"), store=store, rank=0, world_size=1))
    monkeypatch.setattr(parallel, "rendezvous", lambda url: iter([(store, 0, 1)]))
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))  # what torch asks
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(parallel, "store", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        parallel.start()
        assert set(map(str, dist.group.WORLD._device_types)) == {"cpu", "cuda"}
        parallel.all_reduce(value := torch.ones(3))
        assert value.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()


def test_under_torchrun_a_bad_input_that_one_process_meets_ends_all_and_is_told_once(tmp_path):
    """Else torchrun's way of starting and ending processes is not what the other tests take it for."""
    toy_checkpoint(tmp_path / "toy")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").touch()  # which only rank 0 sees: it alone makes the folder
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / "distill.py"), "--model", "toy", *map(str, SMALL), "--out", "taken"],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode and time.monotonic() - begin < 100
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "taken exists and is not empty" in said[0], done.stderr
    assert "Connection closed" not in done.stderr, done.stderr
