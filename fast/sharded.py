"""A base model that does not fit one GPU: every rank keeps a part of each block, and gathers a block to run it.

FSDP2 (`fully_shard`) does the parting and gathering. It is given the base alone, which is not trained: adapters and
heads, small beside it, stay whole on every rank, so gradients, optimizer and checkpoints are those of parallel.py.
Embedding, last norm and read-out stay whole, too.

Gathering needs all ranks at once, and ranks run different layers: their tokens exit at different depths, their
responses end at different times, they have different numbers of micro-batches. So they take turns. Before a block runs,
forward or backward, every rank says which layer it wants next; all gather the deepest of these, and those that wanted
it run it. The deepest, so that a pass that has begun ends first and all begin the next one together. A rank that has
come to where the ranks meet anyway wants none, and helps until none wants any. So every turn takes at least one rank
on, and none waits for ever. To gather every block for every token is slow: where the base fits while nothing else is
held, rollouts have it whole. The plain way is a whole base on every rank.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import parallel
from fast.cache import free_memory

NONE = -1


class Fetch(torch.autograd.Function):
    """The identity, whose backward fetches the layer that it stands behind, before anything of its own backward."""

    @staticmethod
    def forward(ctx, h, shards, layer):
        ctx.shards, ctx.layer = shards, layer
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        ctx.shards.fetch(ctx.layer)
        return grad, None, None


class Shards:
    """The blocks of a policy's base, shared out."""

    def __init__(self, policy, device):
        parallel.before_collective()  # with another policy's blocks, which are then let go
        parallel.helper = None
        model, self.held, self.whole = policy.model, None, False
        device = torch.device(device)
        trained, mesh = set(policy.trained().values()), init_device_mesh(device.type, (parallel.size(),))
        self.blocks = list(model.model.layers)
        self.bytes = sum(p.nbytes for block in self.blocks for p in block.parameters())
        for block in self.blocks:
            fully_shard(block, mesh=mesh, ignored_params=trained)
        for p in policy.parameters():
            if not hasattr(p, "device_mesh"):  # what is not shared out
                p.data = p.data.to(device)
        self.like, policy.device = model.lm_head.weight, device
        model.shards, parallel.helper = self, self

    def turn(self, wanted: int) -> int:
        """Gathers the deepest layer that any rank wants, and names it."""
        deepest = torch.tensor(wanted)
        dist.all_reduce(deepest, dist.ReduceOp.MAX)
        if (layer := int(deepest)) != NONE:
            if self.held is not None:
                self.blocks[self.held].reshard()
            self.blocks[layer].reshard()  # on all ranks alike, also where its last pass has left it whole
            self.blocks[layer].unshard()
            self.held = layer
        return layer

    def fetch(self, layer: int) -> None:
        while not self.whole and self.turn(layer) != layer:
            pass

    def finish(self) -> None:
        """Helps the others until none wants a layer."""
        while self.turn(NONE) != NONE:
            pass
        if self.held is not None:
            self.blocks[self.held].reshard()

    def fits(self) -> bool:
        """Whether this rank has room for the whole base, and for as much again."""
        return free_memory(self.like) > 2 * self.bytes

    @contextmanager
    def gathered(self):
        """Inside, every rank has all blocks whole and takes no turns, if that fits on all of them."""
        self.finish()
        self.whole = all(parallel.all_gather([self.fits()]))
        for block in self.blocks if self.whole else ():
            block.set_reshard_after_forward(False)
            block.unshard()
        try:
            yield
        finally:
            for block in self.blocks if self.whole else ():
                block.set_reshard_after_forward(True)
                block.reshard()
            self.whole = False

    def in_backward(self, h: torch.Tensor, layer: int) -> torch.Tensor:
        return Fetch.apply(h, self, layer) if h.requires_grad else h
