"""Many processes, one run: `torchrun --nproc-per-node N distill.py …` (rloo.py, evaluate.py), on one machine or many.

Every process, called a rank, holds the whole base model (with --shard a part of it, fast/sharded.py) and takes its
share of a step's prompts; the gradients of adapters and heads, small beside it, are added up. A random number belongs
to a response's place in the whole step and never to a rank, so the same run on another number of ranks draws by the
same random numbers. Rank 0 alone writes and speaks. Without torchrun there is one rank, and nothing here does anything.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

# A rank that waits longer for the others gives up: rollouts of one step may differ by many minutes.
TIMEOUT = timedelta(hours=2)
store = None  # a few values that all ranks see
helper = None  # fast.sharded.Shards, where a rank holds a part of the base, which the others ask it for


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def shared(main):
    """Marks a script's main that shares its work among the ranks; any other refuses to be several."""
    main.shared = True
    return main


def start() -> None:
    """Joins the other ranks: over NCCL for what lies on GPUs, over gloo for the rest."""
    global store
    if size() > 1 and not dist.is_initialized():
        if local() < torch.cuda.device_count():
            torch.cuda.set_device(local())
        store, _, _ = next(rendezvous("env://"))
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        # Both by name: unasked, torch takes the accelerator's backend alone, which can't add what lies on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank(), world_size=size(),
                                timeout=TIMEOUT)
        if rank():
            sys.stdout = open(os.devnull, "w")


def end() -> None:
    if dist.is_initialized():
        before_collective()
        dist.destroy_process_group()


def first_to_end() -> bool:
    """Whether no rank has ended early before this one. It says why; those whose connections then break keep quiet."""
    try:
        return store is None or store.add("ended", 1) == 1
    except RuntimeError:  # who kept the store is gone
        return False


def local() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_here() -> int:
    """Those on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device(name: str) -> str:
    """This rank's device: of several GPUs, its own."""
    return f"cuda:{local()}" if name == "cuda" and size() > 1 else name


def share(count: int) -> slice:
    """This rank's part of `count` things: neighbours, in order; none, where there are fewer things than ranks."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def before_collective() -> None:
    """With a base that is shared out, gives its part to the ranks that still run layers; waiting for them at once would
    leave them waiting for it."""
    if helper is not None:
        helper.finish()


def all_gather(mine: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if size() == 1:
        return mine
    before_collective()
    parts = [None] * size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def from_rank_0(make: Callable):
    """What make() gives on rank 0, on every rank; the others don't call it."""
    if size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    before_collective()
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce(*tensors: torch.Tensor) -> None:
    """Sums tensors of one dtype and device over the ranks, in place and in one message."""
    if size() > 1:
        before_collective()
        whole = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(whole)
        for t, total in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view_as(t))


def add_gradients(parameters) -> None:
    """The gradient of the whole step, from each rank's part of it; a parameter without one adds 0."""
    if size() > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        all_reduce(*(p.grad for p in parameters))


@torch.no_grad()
def broadcast(tensors) -> None:
    """Rank 0's values into the tensors of all ranks."""
    if size() > 1:
        before_collective()
        for t in tensors:
            dist.broadcast(t, src=0)


def bar(**about) -> tqdm:
    """A progress bar, of rank 0's work."""
    return tqdm(**about, disable=rank() > 0)
