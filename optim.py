"""The optimizer's side of both stages: which problems a step takes, AdamW, the rate's schedule, the step itself."""

import math

import numpy as np
import torch

import parallel
from exits import Policy


def pick(count: int, size: int, step: int, seed: int) -> list[int]:
    """The step's `size` indices out of 0..count-1: a fresh shuffle every epoch, without replacement inside one."""
    wanted = range(step * size, (step + 1) * size)
    return [int(np.random.default_rng([seed, i // count]).permutation(count)[i % count]) for i in wanted]


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: ten steps of warm-up, times a line that falls to zero. Where --resume moves the
    end, the line goes to the new one, and the rate jumps to it."""
    return min(1.0, (step + 1) / 10) * (1 - step / steps)


def adamw(policy: Policy) -> torch.optim.AdamW:
    """The optimizer over adapters and heads; `take_step` sets its rates."""
    heads = list(policy.heads.parameters())  # a group of their own, since stage 1 gives them a rate of their own
    adapters = [p for name, p in policy.trained().items() if not name.startswith("heads.")]
    # eps far below any gradient: stage 2's is divided by c, thousands of tokens, and spread over millions of values.
    optimizer = torch.optim.AdamW([{"params": adapters}, {"params": heads}], lr=0.0, betas=(0.9, 0.95), eps=1e-12,
                                  weight_decay=0.0)
    for p in policy.trained().values():  # there from the start, so that every checkpoint holds the same tensors
        optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def take_step(optimizer, lr: float, head_lr: float) -> float:
    """Adds up the ranks' gradients, clips to norm 1 (stage 2's, divided by c, stays far below) and steps, adapters at
    `lr`, heads at `head_lr`; drops a gradient that isn't finite. Returns its norm before it was clipped."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.add_gradients(params)
    norm = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
    if math.isfinite(norm):
        for group, rate in zip(optimizer.param_groups, (lr, head_lr), strict=True):
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
