"""A base that is shared out over ranks against a whole one."""

import argparse
import sys

import torch
from safetensors.torch import load_file, save_file

import distill
import parallel
import rloo
from fast.sharded import Shards
from sample import generate
from tests.test_parallel import PROMPTS, together
from tests.toys import assert_close, toy_policy


def main() -> None:
    """What the ranks of the next test do."""
    policy, results = toy_policy(seed=2).double(), {}
    out, recompute = sys.argv[1], sys.argv[2] == "recompute"
    policy.model.recompute = recompute
    if parallel.size() > 1:
        Shards(policy, "cpu")
    args = argparse.Namespace(micro_batch=1, kl_factor=1.0, draws=2, seed=3, beta=0.3, max_new_tokens=6)
    share = parallel.share(len(PROMPTS))
    mine = generate(policy, PROMPTS[share], samples=2, max_new_tokens=6, eos_ids=range(0, 61, 7), seed=(4,),
                    first_row=2 * share.start)
    drawn = parallel.gather(mine)
    results["samples"] = torch.tensor([[*r.token_ids, *[-1] * 6][:6] + [*r.depths, *[-1] * 6][:6] for r in drawn])

    def gradient(name):
        parallel.add_gradients(policy.trained().values())
        results.update({f"{name} {key}": p.grad.clone() for key, p in policy.trained().items()})
        policy.zero_grad()

    distill.train_step(policy, drawn[:5], 1, args)
    gradient("stage 1")
    base, mean_kl, _ = rloo.score_responses(policy, mine, args.micro_batch)
    advantages = torch.arange(6.0, dtype=torch.double).sin()[2 * share.start : 2 * share.stop]
    rloo.accumulate_gradient(policy, mine, advantages, base, len(drawn), args)
    gradient("stage 2")
    if parallel.rank() == 0:
        save_file(results, out)


def test_spike(tmp_path):
    together(1, "tests.test_sharded", "1.safetensors", "keep", cwd=tmp_path)
    alone = load_file(tmp_path / "1.safetensors")
    for size in (2, 4):
        for how in ("recompute", "keep"):
            together(size, "tests.test_sharded", f"{size}{how}.safetensors", how, cwd=tmp_path)
            other = load_file(tmp_path / f"{size}{how}.safetensors")
            for name, value in alone.items():
                assert_close(other[name], value, 1e-10)
