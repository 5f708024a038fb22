"""The parallel pass over whole sequences, without the work that changes nothing.

Only positions that run a layer enter its query, output and MLP products; frozen ones give their keys and values;
padding gives nothing. And a prompt that several sequences share is run once. Attention itself still goes over all
B x T, zeros where nothing stands: torch's kernels want a rectangle. The plain way is to run all positions and to take
`torch.where(running, new, old)` after every layer; tests/reference.py does it so.
"""

import torch

from model import Causal, causal_attention, rope


def send(x: torch.Tensor, device) -> torch.Tensor:
    """A small tensor of the host's, on the device; an ordinary copy would wait for all that the device has to do."""
    return x.to(device, non_blocking=True)


class Sequences:
    """A place (Policy.forward): it runs layers for those positions of sequences (B, T) that need them.

    shared_from (B, T), on the host, gives every position the flat index b T + t of the one whose keys and values it
    uses: of a prompt that several sequences have, the first one's positions run, and the others' have depth 0. With a
    `cache`, the keys and values of sequence b also go into its rows rows[b], of `rows` (B, G) on the device: so a
    prompt is read once for G samples.
    """

    def __init__(self, shape, shared_from: torch.Tensor | None = None, cache=None, rows: torch.Tensor | None = None):
        self.shape, self.shared_from, self.cache, self.rows = tuple(shape), shared_from, cache, rows

    def run(self, model, h: torch.Tensor, segment: int, layers: range, running: torch.Tensor) -> torch.Tensor:
        """Streams (B, T, D) before some layers -> after them. `running` (B, T), on the host: who runs them; the
        others keep their streams. A position left out of the first segment, padding or a prompt that stands elsewhere,
        gives no keys and values either."""
        h = h.flatten(0, 1)
        if segment == 0:  # a pass begins: what its segments share
            self.tables, self.present = rope(self.shape[1], model.config, h), running
            self.source = None if self.shared_from is None else send(self.shared_from.flatten(), h.device)
        if running.all() and self.cache is None:  # nothing to leave out, nor to keep
            return model.run(h, layers, Causal(self.shape, *self.tables)).unflatten(0, self.shape)
        site = Packed(self, h, running)
        h = h.index_copy(0, site.run_at, model.run(h.index_select(0, site.run_at), layers, site))
        return h.unflatten(0, self.shape)


class Packed:
    """A site of whole sequences of which only some positions run: n of the B T, and m frozen ones."""

    def __init__(self, place: Sequences, h: torch.Tensor, running: torch.Tensor):
        self.shape, self.place = place.shape, place
        frozen = place.present & ~running
        self.run_at, frozen_at = (send(x.flatten().nonzero()[:, 0], h.device) for x in (running, frozen))  # of B T
        self.all_at = torch.cat([self.run_at, frozen_at])
        self.cos, self.sin = (table[self.all_at % self.shape[1]] for table in place.tables)
        self.frozen = h.index_select(0, frozen_at) if len(frozen_at) else None  # streams, for model.Block

    def unpack(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Packed (n, heads, C) -> (B, T, heads, C), zero where nothing stands."""
        x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, at, x)
        return x.unflatten(0, self.shape)

    def attend(self, layer: int, q, k, v) -> torch.Tensor:
        """Queries (n, H, C) over keys and values (n + m, K, C) -> (n, H C)."""
        q, k, v = self.unpack(q, self.run_at), self.unpack(k, self.all_at), self.unpack(v, self.all_at)
        if self.place.source is not None:
            k, v = (x.flatten(0, 1).index_select(0, self.place.source).view_as(x) for x in (k, v))
        if self.place.cache is not None:
            self.place.cache.write_prompts(layer, self.place.rows, k, v)
        return causal_attention(q, k, v).index_select(0, self.run_at)
