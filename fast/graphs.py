"""CUDA graphs of decoding: a whole segment in one launch."""

import torch

from fast.cache import Cache, NextTokens
from fast.packing import send


class Graphs:
    """One graph for each segment and number of slots, captured when first met (slots in blocks of SLOTS).

    A graph has fixed shapes, so every row of the cache runs it. What frozen and empty rows compute is thrown away: the
    stream here, and the keys and values are written over when the token is filled in. On a GPU a step of few rows waits
    for weights and launches, not for arithmetic, so these rows cost little. On a CPU the same runs without a capture.
    """

    SLOTS = 256

    def __init__(self):
        self.captured = {}  # they read the tensors of the one cache that has these graphs
        self.pool = self.side = None

    def run(self, cache: Cache, model, h: torch.Tensor, segment: int, layers: range, running) -> torch.Tensor:
        """Streams (R, D) before a segment -> after it; rows that are not `running` (R,) keep theirs."""
        blocks = model.model.layers[layers.start : layers.stop]
        S = cache.k.shape[2]
        length = send(cache.length.clamp(max=S - 1), h.device)  # a full row that has ended runs too, to no effect
        row, slot = (send(x, h.device) for x in cache.fill(segment, running.nonzero()[:, 0]))
        if len(row):
            late, streams = NextTokens(cache, row, slot, S), cache.streams[row, slot]
            for layer, block in zip(layers, blocks, strict=True):
                late.write(layer, *block.self_attn.keys_values(block.input_layernorm(streams), late.cos, late.sin))
        longest = min(S, -(-(int(cache.length[running].max()) + 1) // self.SLOTS) * self.SLOTS)

        def forward(h, length):
            return model.run(h, layers, NextTokens.of_all(cache, length, longest))

        if h.is_cuda:
            if (segment, longest) not in self.captured:
                self.captured[segment, longest] = self.capture(forward, h.clone(), length.clone())
            graph, given, out = self.captured[segment, longest]
            for mine, value in zip(given, (h, length), strict=True):
                mine.copy_(value)
            graph.replay()
        else:
            out = forward(h, length)
        return torch.where(send(running, h.device)[:, None], out, h)

    def capture(self, forward, *given):
        """(graph, its inputs, its output). Graphs share a pool: none needs its insides after its replay."""
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        self.side = self.side or torch.cuda.Stream()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            forward(*given)  # kernels are chosen and workspaces made outside the capture
        torch.cuda.current_stream().wait_stream(self.side)
        with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
            out = forward(*given)
        return graph, given, out
