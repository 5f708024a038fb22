"""A base model that does not fit one GPU: every rank keeps a share of each block and gathers a block when it runs it.

FSDP2 (`fully_shard`) does the sharing and gathering. It is given the frozen base alone: adapters and heads, a few million
numbers, stay whole on every rank, so gradients, optimizer and checkpoints are those of parallel.py. Embedding, last norm
and read-out stay whole, too.

Gathering is a collective, and ranks run different layers: their tokens exit at different depths, their responses end at
different times, they have different numbers of micro-batches. So they take turns. Before a block runs, forward or
backward, every rank says which layer it wants next; all gather the deepest of these, and those that wanted it run it. The
deepest, so that a pass that has begun is finished and all meet again at layer 0. A rank that wants none, because it has
come to where the ranks meet anyway, helps until none wants any. So at least one rank gets on at every turn, and none
waits for ever. Gathering every block for every token is slow: where the base fits while nothing else is held, a rollout
has it whole. The plain way is a base on every rank.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import parallel
from checkpoints import fingerprint

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
        model, self.held, self.whole = policy.model, None, False
        model.mark = fingerprint(model)  # its values are in no one place from here on
        device = torch.device(device)
        trained, mesh = set(policy.trained().values()), init_device_mesh(device.type, (parallel.size(),))
        self.blocks = list(model.model.layers)
        self.bytes = sum(p.nbytes for block in self.blocks for p in block.parameters())
        for block in self.blocks:
            fully_shard(block, mesh=mesh, ignored_params=trained)
        for p in policy.parameters():
            if not hasattr(p, "device_mesh"):  # what is not shared out
                p.data = p.data.to(device)
        policy.device, model.shards, parallel.before_meeting = device, self, self.finish

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

    def in_backward(self, h: torch.Tensor, layer: int) -> torch.Tensor:
        return Fetch.apply(h, self, layer) if h.requires_grad else h
