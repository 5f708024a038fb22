"""Decoding: one new token a row against cached keys and values, without the work of frozen tokens.

A token that froze below a segment of layers needs no query, attention output or MLP there, and its keys and values only
once a later token of its row runs the segment, which is often never. So a segment runs on packed rows, and the streams
of frozen tokens wait until they are asked for; then all that wait come in one product. The plain way, the whole text
anew for every token, is tests/reference.py.
"""

import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F

import parallel
from fast.packing import send
from model import Config, rope

LONG = 2**15  # numbers in a row's keys from which a CPU attends row by row: all in one call cost more (bench/LOG.md)
# cuDNN's attention plans anew for every shape, and a cache has a new length at every token.
torch.backends.cuda.enable_cudnn_sdp(False)


class Cache:
    """A place (Policy.forward): keys and values of R rows, preallocated, and the final streams of their tokens.

    Row r holds length[r] tokens. The layers between two exits are a segment; in segment g the first filled[g, r]
    tokens of a row have their keys and values. The others froze below it and wait: their streams are in `streams`.
    Slots beyond a row's length hold rubbish that nothing reads.
    """

    def __init__(self, config: Config, rows: int, slots: int, segments: int, like: torch.Tensor, graphs=None):
        shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.streams = like.new_zeros(rows, slots, config.hidden_size)
        self.length = torch.zeros(rows, dtype=torch.long)  # these two stay on the host, which plans every step
        self.filled = torch.zeros(segments, rows, dtype=torch.long)
        self.cos, self.sin = rope(slots, config, like)
        self.graphs = graphs  # fast.graphs.Graphs, to decode by CUDA graphs
        self.site: NextTokens | None = None

    def write_prompts(self, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keys and values (P, T, K, C) of prompts, into the rows (P, G), on the device, that continue them."""
        at = rows.flatten()
        self.k[layer, at, : k.shape[1]] = k.repeat_interleave(rows.shape[1], dim=0)
        self.v[layer, at, : v.shape[1]] = v.repeat_interleave(rows.shape[1], dim=0)

    def admit(self, rows: torch.Tensor, length: torch.Tensor) -> None:
        """Declares the rows (P, G) to hold P prompts of the given lengths (P,), run at full depth."""
        self.length[rows] = self.filled[:, rows] = length[:, None]

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows only. Captured graphs would go on reading the old tensors."""
        self.length, self.filled = self.length[rows], self.filled[:, rows]
        rows = send(rows, self.k.device)
        self.k = self.k[:, rows]  # one by one: all at once, the old three would wait beside the new ones
        self.v = self.v[:, rows]
        self.streams = self.streams[rows]

    def run(self, model, h: torch.Tensor, segment: int, layers: range, running: torch.Tensor) -> torch.Tensor:
        """Streams (R, 1, D) of the rows' new tokens before a segment -> after it. `running` (R, 1), on the host: who
        runs it; the others keep their streams. A row left out of the first segment has no new token."""
        h, running = h[:, 0], running[:, 0]
        if segment == 0:
            self.present = running
        if not running.any():  # and no later segment either
            return h[:, None]
        if self.graphs is not None:
            return self.graphs.run(self, model, h, segment, layers, running)[:, None]
        site = self.next_tokens(segment, running)
        if site.rows is None:  # all
            return model.run(h, layers, site)[:, None]
        return h.index_copy(0, site.rows, model.run(h.index_select(0, site.rows), layers, site))[:, None]

    def end(self, h: torch.Tensor) -> None:
        """Ends a step: of h (R, 1, D) the final streams of rows that had a new token are kept, and these are longer."""
        rows = self.present.nonzero()[:, 0]
        row, slot = send(rows, h.device), send(self.length[rows], h.device)
        self.streams[row, slot] = h[row, 0]
        self.length[rows] += 1
        self.site = None  # it refers to the cache, which would stay alive until Python's cycle collector runs

    def fill(self, segment: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks all tokens of the given rows, their new ones included, as having keys and values in a segment. Returns
        row and slot (m,) of those that had waited for them, whose keys and values the caller now has to write."""
        first, length = self.filled[segment, rows], self.length[rows]
        self.filled[segment, rows] = length + 1
        count = length - first
        start = count.cumsum(0) - count  # where each row's slots begin in the list of all
        slot = torch.arange(int(count.sum())) + (first - start).repeat_interleave(count)
        return rows.repeat_interleave(count), slot

    def next_tokens(self, segment: int, running: torch.Tensor) -> "NextTokens":
        """The site of the new tokens of the `running` rows (R,). If the same rows ran the segment below, and no token
        waits in this one, its site serves again."""
        again = self.site is not None and torch.equal(self.site.running, running)
        if again and (self.filled[segment] == self.length)[running].all():
            self.filled[segment] += running
        else:
            self.site = NextTokens.of_rows(self, segment, running)
        return self.site


class NextTokens:
    """A site of one new token in each of n rows, which attend to slots 0..longest-1, and of m tokens that waited."""

    def __init__(self, cache: Cache, row: torch.Tensor, slot: torch.Tensor, longest: int):
        """Tokens at the given rows and slots (n + m,): the n new ones, then m that waited."""
        self.cache, self.longest = cache, longest
        self.position = row * cache.k.shape[2] + slot  # where keys and values are written: flat, row by row
        self.cos, self.sin = cache.cos[slot], cache.sin[slot]
        self.frozen = None  # (m, D) streams of the tokens that waited
        self.rows = None  # the n rows that attend; None: all
        self.running = None  # (R,) on the host: the same, to tell whether this site serves again
        self.mask = None  # (n, 1, 1, longest) -inf beyond a row's end; None: every row ends at `longest`
        self.ends = None  # (row, end) pairs, where each row attends in a call of its own

    @classmethod
    def of_rows(cls, cache: Cache, segment: int, running: torch.Tensor) -> "NextTokens":
        """The new tokens of the running rows (R,), and the waiting ones whose keys and values they need."""
        device, (_, R, _, K, C), rows = cache.k.device, cache.k.shape, running.nonzero()[:, 0]
        row, slot = cache.fill(segment, rows)
        end = cache.length[rows] + 1
        site = cls(cache, send(torch.cat([rows, row]), device), send(torch.cat([end - 1, slot]), device),
                   int(end.max()))
        site.running = running
        site.rows = None if len(rows) == R else send(rows, device)
        if len(row):
            site.frozen = cache.streams.flatten(0, 1).index_select(0, site.position[len(rows) :])
        if device.type == "cpu" and R > 1 and site.longest * K * C >= LONG:
            site.ends = list(zip(rows.tolist(), end.tolist(), strict=True))
        elif (end < site.longest).any():
            site.mask = site.as_mask(torch.arange(site.longest, device=device) >= send(end, device)[:, None])
        return site

    @classmethod
    def of_all(cls, cache: Cache, length: torch.Tensor, longest: int) -> "NextTokens":
        """Every row runs and attends to its first length[r] + 1 slots: shapes depend on no value but `longest`."""
        site = cls(cache, torch.arange(len(length), device=length.device), length, longest)
        site.mask = site.as_mask(torch.arange(longest, device=length.device) > length[:, None])
        return site

    def as_mask(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.cache.k.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]

    def write(self, layer: int, k, v) -> None:
        self.cache.k[layer].flatten(0, 1).index_copy_(0, self.position, k)
        self.cache.v[layer].flatten(0, 1).index_copy_(0, self.position, v)

    def attend(self, layer: int, q, k, v) -> torch.Tensor:
        """Queries (n, H, C) over the rows' slots, after k and v (n + m, K, C) took theirs -> (n, H C)."""
        self.write(layer, k, v)
        keys, values = self.cache.k[layer], self.cache.v[layer]  # (R, S, K, C)
        n, H, C = q.shape
        q = q.view(n, k.shape[1], -1, C)  # the heads of a group stand in for the query axis, so K/V stay uncopied
        if self.ends is not None:  # reads no other row's padding, and copies nothing
            out = torch.cat([F.scaled_dot_product_attention(
                q[i : i + 1], keys[row : row + 1, :end].transpose(1, 2), values[row : row + 1, :end].transpose(1, 2))
                for i, (row, end) in enumerate(self.ends)])
            return out.reshape(n, H * C)
        keys, values = keys[:, : self.longest], values[:, : self.longest]
        if self.rows is not None:
            keys, values = keys.index_select(0, self.rows), values.index_select(0, self.rows)
        out = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=self.mask)
        return out.reshape(n, H * C)


def row_bytes(config: Config, slots: int, like: torch.Tensor) -> int:
    """Memory of one cache row: slots x (2 L K C + D) numbers in the base's dtype."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim + config.hidden_size
    return slots * numbers * like.element_size()


def free_memory(like: torch.Tensor) -> int:
    """Bytes that are free now where `like` lies, for this process."""
    if like.is_cuda:
        held = torch.cuda.memory_reserved(like.device) - torch.cuda.memory_allocated(like.device)
        return torch.cuda.mem_get_info(like.device)[0] + held
    try:  # what file caches hold, weights just read among them, is free
        available = 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS can't say what is free
    return available // parallel.ranks_here()


def fitting_rows(config: Config, slots: int, like: torch.Tensor) -> int:
    """Cache rows in half of the memory that is free now, at most 256. The rest is for prefill, read-out, and a copy of
    half of the rows' keys, or values, when the last of them end."""
    return max(1, min(256, free_memory(like) // 2 // row_bytes(config, slots, like)))
