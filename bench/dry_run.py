"""One step of each stage at a published model's shapes with random weights: does it fit, and does it step?

    python bench/dry_run.py --shape qwen3-4b                     all layers, on the GPU where there is one
    python bench/dry_run.py --shape r1-distill-1.5b --layers 4   a few layers, for a CPU

Random weights say nothing about quality: only about shapes, memory and the order of magnitude of the time.
"""

import argparse
import time

import torch
from common import SHAPES, peak_gib, random_model, synchronise  # which puts the project on the path

import distill
import flags
import rloo
import runs
from exits import Policy
from optim import adamw, take_step
from sample import generate


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="(default: %(default)s)")
    p.add_argument("--layers", type=flags.whole(2), help="run only so many layers (default: all)")
    p.add_argument("--prompt", type=flags.whole(1), default=128, help="tokens of a prompt (default: 128)")
    p.add_argument("--new", type=flags.whole(1), default=128, help="tokens of a response (default: 128)")
    p.add_argument("--prompts", type=flags.whole(1), default=2, help="of a step (default: 2)")
    p.add_argument("--samples", type=flags.whole(2), default=2, help="of each (default: 2)")
    p.add_argument("--rows", type=flags.whole(1), help="responses sampled at once (default: what fits)")
    p.add_argument("--micro-batch", type=flags.whole(1), default=1, help="responses in one pass (default: 1)")
    p.add_argument("--cuda-graphs", action="store_true", help="decode by CUDA graphs")
    args = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = random_model(args.shape, args.layers, dtype, device)
    model.recompute, model.graphs = True, args.cuda_graphs
    policy = Policy(model, head_width=256)
    optimizer = adamw(policy)
    trained = sum(p.numel() for p in policy.trained().values())
    size = sum(p.numel() for p in policy.parameters())
    print(f"{args.shape}, {policy.n_layers} layers, exits {policy.exits}, {dtype} on {device}: "
          f"{size / 1e9:.2f} B parameters, {trained / 1e6:.1f} M trained")

    def timed(name, function):
        start = time.perf_counter()
        value = function()
        synchronise(device)
        print(f"  {name:28} {time.perf_counter() - start:7.1f} s   peak so far {peak_gib(device):5.1f} GiB", flush=True)
        return value

    prompts = torch.randint(0, model.config.vocab_size, (args.prompts, args.prompt)).tolist()
    n = args.prompts * args.samples

    def rollout():
        return generate(policy, prompts, samples=args.samples, max_new_tokens=args.new, eos_ids=[-1], rows=args.rows)

    responses = timed(f"rollout, {n} x {args.new} tokens", rollout)
    timed(f"stage 1, gradient of {n}", lambda: distill.train_step(
        policy, responses, step=0, kappa=1.0, seed=0, micro_batch=args.micro_batch))
    print(f"    gradient norm {take_step(optimizer, 1e-5, 1e-5):.3g}")
    parts, mean_kl, _ = timed(f"stage 2, score {n}", lambda: rloo.score_responses(policy, responses, args.micro_batch))
    rewards = rloo.reward(torch.arange(n) % 2, 0.0, mean_kl, 0.0, 0.02).view(args.prompts, args.samples)
    timed(f"stage 2, gradient of {n}", lambda: rloo.accumulate_gradient(
        policy, parts, rloo.leave_one_out(rewards).flatten(), beta=0.02, c=args.new, count=n))
    print(f"    gradient norm {take_step(optimizer, 1e-5, 1e-5):.3g}")
    parts = None  # its memory, as in rloo.py
    timed("rollout, in the memory left so", rollout)


if __name__ == "__main__":
    runs.run_main(main)
