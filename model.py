"""A dense Qwen2 / Qwen3 transformer in plain PyTorch that loads what the hub holds.

Module names are those of the Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight`), so loading is a
strict match of names and shapes. Shapes: B sequences, T positions, D width, H query heads, K key/value heads,
C head dim, R cache rows, S cache slots, V vocabulary, L layers; n packed positions that run a layer, m that only give
it their keys and values.

Early exits need one thing of a transformer, and it is here so that every caller shares it: before each segment of
layers the one loop asks a `gate` which positions run it. Those are packed, and nothing else enters the segment's
query, attention and MLP products; a frozen position only gives keys and values, and in the cache not before a later
token of its row needs them. Who decides is `exits.py`.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.hub import UserError, read_json, resolve

# PyTorch multiplies float32 matrices on a CPU by MKL; oneDNN, which it also ships, took half the time (bench/LOG.md).
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
SMALL = 2**18  # multiplications up to which its larger cost of a call is not worth it
LONG = 2**15  # numbers of K in a row from which a CPU attends row by row: one call for all costs more (bench/LOG.md)
# cuDNN's attention plans anew for every shape, and a cache has a new length at every token.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Config:
    """The fields of a checkpoint's config.json that are read, under their Hugging Face names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool
    max_position_embeddings: int

    @classmethod
    def from_dict(cls, cfg: dict, where: str = "config.json") -> "Config":
        """Reads either generation of config (`rope_theta`/`rope_scaling`, or `rope_parameters`).

        Raises UserError naming the field for anything that this model would compute differently.
        """

        def refuse(field, why):
            raise UserError(f"{where}: {field} = {cfg.get(field)!r}: {why}")

        kind = cfg.get("model_type")
        if kind not in ("qwen2", "qwen3"):
            refuse("model_type", "only dense 'qwen2' and 'qwen3' checkpoints are implemented")
        for field in ("num_experts", "num_local_experts", "quantization_config"):
            if cfg.get(field):
                refuse(field, "mixture-of-experts and quantised weights are not implemented; use a dense checkpoint")
        if cfg.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", "only 'silu' is implemented")
        if cfg.get("use_sliding_window") or "sliding_attention" in (cfg.get("layer_types") or ()):
            refuse("layer_types" if cfg.get("layer_types") else "use_sliding_window",
                   "sliding-window attention is not implemented")
        rope = cfg.get("rope_parameters") or cfg.get("rope_scaling") or {}
        rope = rope.get("full_attention", rope)  # transformers 5 may nest it by layer type
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            refuse("rope_parameters" if cfg.get("rope_parameters") else "rope_scaling",
                   f"RoPE scaling '{rope_type}' is not implemented; remove it to run at the original context length")

        try:
            heads = cfg["num_attention_heads"]
            return cls(
                model_type=kind,
                vocab_size=cfg["vocab_size"],
                hidden_size=cfg["hidden_size"],
                intermediate_size=cfg["intermediate_size"],
                num_hidden_layers=cfg["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=cfg.get("num_key_value_heads") or heads,
                # Qwen2 has no head_dim field; Qwen3's is explicit and H*C need not equal D.
                head_dim=cfg.get("head_dim") or cfg["hidden_size"] // heads,
                rms_norm_eps=cfg.get("rms_norm_eps", 1e-6),
                rope_theta=float(rope.get("rope_theta") or cfg.get("rope_theta") or 10_000.0),
                tie_word_embeddings=cfg.get("tie_word_embeddings", False),
                # Qwen2 always has biases on q, k and v and no field that says so.
                attention_bias=True if kind == "qwen2" else cfg.get("attention_bias", False),
                max_position_embeddings=cfg.get("max_position_embeddings", 32_768),
            )
        except KeyError as missing:
            raise UserError(f"{where}: field {missing} is missing; is this a complete checkpoint?") from None


class OneDNN(torch.autograd.Function):
    """x W^T + b, differentiable: the operator itself has no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return ONEDNN(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = ONEDNN(grad, weight.t(), None, "none", [], "") if ctx.needs_input_grad[0] else None
        grad = grad.flatten(0, -2)
        grad_weight = grad.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b: (..., D_in) -> (..., D_out), by the faster of two kernels for the same numbers."""
    if ONEDNN is None or x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() * len(weight) < SMALL:
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):  # both know F.linear only
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return OneDNN.apply(x, weight, bias)
    return ONEDNN(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The weight stays outside: Hugging Face casts before it multiplies, which differs in bfloat16.
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def rope(slots: int, config: Config, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables (slots, 1, C) of the rotary cos and sin, computed in float32. The first half of sin is negated, so that
    `rotate` need not negate half of every head."""
    half = torch.arange(0, config.head_dim, 2, device=like.device).float() / config.head_dim
    angle = torch.arange(slots, device=like.device).float()[:, None] * (1.0 / config.rope_theta**half)  # (slots, C/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None].to(like.dtype), torch.cat([-sin, sin], -1)[:, None].to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def send(x: torch.Tensor, device) -> torch.Tensor:
    """A small tensor of the host's, on the device; an ordinary copy would wait for all that the device has to do."""
    return x.to(device, non_blocking=True)


class Cache:
    """Keys and values of R rows, preallocated, and the streams of frozen tokens: `numbers` of a slot each.

    Row r holds length[r] tokens. The layers between two stops are a segment; in segment g the first filled[g, r]
    positions of a row have their keys and values. The others froze below it: their streams wait in `frozen` until a
    token of the row runs the segment, which is often never. Slots beyond these hold rubbish that nothing reads.
    """

    def __init__(self, config: Config, rows: int, slots: int, segments: int, like: torch.Tensor):
        shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.frozen = like.new_zeros(rows, slots, config.hidden_size)
        self.length = torch.zeros(rows, dtype=torch.long)  # these two stay on the host, which plans every step
        self.filled = torch.zeros(segments, rows, dtype=torch.long)
        self.cos, self.sin = rope(slots, config, like)
        self.graphs: Graphs | None = None  # set to decode by CUDA graphs
        self.last: NextTokens | None = None

    @staticmethod
    def numbers(config: Config) -> int:
        """Of a slot: 2 L K C + D."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim + config.hidden_size

    def admit(self, rows: torch.Tensor, length: torch.Tensor) -> None:
        """Declares the rows (P, G) to hold P prompts of the given lengths (P,), run at full depth."""
        self.length[rows] = self.filled[:, rows] = length[:, None]

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows only."""
        self.length, self.filled = self.length[rows], self.filled[:, rows]
        rows = rows.to(self.k.device)
        self.k, self.v, self.frozen = self.k[:, rows], self.v[:, rows], self.frozen[rows]
        self.graphs = self.graphs and Graphs()  # the captured ones read the old tensors

    def advance(self, h: torch.Tensor, rows: torch.Tensor) -> None:
        """Ends a step: the given rows are one token longer, and its final stream h[r] (R, D) is remembered."""
        at, end = send(rows, h.device), send(self.length[rows], h.device)
        self.frozen[at, end] = h[at]
        self.length[rows] += 1
        self.last = None  # it refers to the cache, which without this would outlive its use

    def pending(self, segment: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and slot (m,) of the tokens that froze below this segment and that the given rows must now attend to.
        Counts these, and the rows' current tokens, as filled."""
        first, end = self.filled[segment, rows], self.length[rows]
        self.filled[segment, rows] = end + 1
        count = end - first
        slot = torch.arange(int(count.sum())) - (count.cumsum(0) - count - first).repeat_interleave(count)
        return rows.repeat_interleave(count), slot

    def layout(self, segment: int, running: torch.Tensor) -> "NextTokens":
        """Where the tokens of the `running` rows (R,) stand in a segment. If the same rows ran the one below, and no
        token waits for this one, its layout serves again."""
        again = self.last is not None and torch.equal(self.last.running, running)
        if again and torch.equal(self.filled[segment] * running, self.length * running):
            self.filled[segment] += running
        else:
            self.last = NextTokens.of_rows(self, segment, running)
        return self.last


class Sequences:
    """The packed positions of a segment in whole sequences (B, T) that start at slot 0: causal attention.

    `rows` (B, G), if given, are the rows of `cache` that get the keys and values of each sequence. `source` (B, T), if
    given, names the flat position whose keys and values stand at each: of a prompt that several sequences have, the
    first one's positions run, and the others' are absent.
    """

    def __init__(self, shape, tables, running=None, present=None, cache: Cache | None = None, rows=None, source=None):
        self.B, self.T = shape
        self.cache, self.rows, self.source = cache, rows, source
        self.run = self.still = None  # flat positions that run, and that only give keys and values; None: all, none
        if running is not None and not running.all():
            self.run = running.flatten().nonzero()[:, 0]
            self.still = (present & ~running).flatten().nonzero()[:, 0]
            self.at = torch.cat([self.run, self.still])
        self.cos, self.sin = (table.repeat(self.B, 1, 1) if self.run is None else table[self.at % self.T]
                              for table in tables)

    def others(self, h: torch.Tensor) -> torch.Tensor | None:
        return None if self.still is None or len(self.still) == 0 else h.index_select(0, self.still)

    def spread(self, x: torch.Tensor, at) -> torch.Tensor:
        """Packed (n, heads, C) -> (B, T, heads, C), zero where nothing stands."""
        if self.run is not None:
            x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, at, x)
        return x.unflatten(0, (self.B, self.T))

    def attend(self, layer, q, k, v) -> torch.Tensor:
        """Queries (n, H, C) over keys and values (n + m, K, C) -> (n, H C)."""
        at = None if self.run is None else self.at
        q, k, v = self.spread(q, self.run), self.spread(k, at), self.spread(v, at)
        if self.source is not None:
            k, v = (x.flatten(0, 1).index_select(0, self.source.flatten()).view_as(x) for x in (k, v))
        if self.rows is not None:
            rows, samples = self.rows.flatten(), self.rows.shape[1]
            self.cache.k[layer, rows, : self.T] = k.repeat_interleave(samples, dim=0)
            self.cache.v[layer, rows, : self.T] = v.repeat_interleave(samples, dim=0)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if k.is_cuda and k.dtype != torch.float32:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # enable_gqa falls back to the slow kernel here: copying K and V is cheaper
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).flatten(0, 1).flatten(1)
        return out if self.run is None else out.index_select(0, self.run)


class NextTokens:
    """One new token in each of the cache's rows, in one segment: those of n rows attend, to slots 0..reach-1."""

    def __init__(self, cache: Cache, row: torch.Tensor, slot: torch.Tensor, reach: int):
        """Tokens at the given rows and slots (n + m,): the n new ones, then m that waited."""
        self.cache, self.reach = cache, reach
        self.at = row * cache.k.shape[2] + slot  # where keys and values are written
        self.cos, self.sin = cache.cos[slot], cache.sin[slot]
        self.waiting = None  # the last m of `at`
        self.run = None  # the n rows that attend; None: all
        self.mask = None  # (n, 1, 1, reach) -inf beyond a row's end; None: every row ends at `reach`
        self.alone = False  # whether each row attends in a call of its own

    @classmethod
    def of_rows(cls, cache: Cache, segment: int, running: torch.Tensor) -> "NextTokens":
        """The new tokens of the running rows (R,), and the waiting ones whose keys and values they need."""
        device, (_, R, _, K, C), rows = cache.k.device, cache.k.shape, running.nonzero()[:, 0]
        row, slot = cache.pending(segment, rows)
        end = cache.length[rows] + 1
        self = cls(cache, send(torch.cat([rows, row]), device), send(torch.cat([end - 1, slot]), device),
                   int(end.max()))
        self.running = running
        self.waiting = self.at[len(rows) :] if len(row) else None
        self.run = None if len(rows) == R else send(rows, device)
        self.each = list(zip(rows.tolist(), end.tolist(), strict=True))
        self.alone = device.type == "cpu" and R > 1 and self.reach * K * C >= LONG
        hidden = torch.arange(self.reach) >= end[:, None]
        self.mask = self.as_mask(send(hidden, device)) if not self.alone and hidden.any() else None
        return self

    @classmethod
    def of_all(cls, cache: Cache, length: torch.Tensor, reach: int) -> "NextTokens":
        """Every row runs, and attends to its first length[r] + 1 slots: shapes that depend on no value but `reach`."""
        self = cls(cache, torch.arange(len(length), device=length.device), length, reach)
        self.mask = self.as_mask(torch.arange(reach, device=length.device) > length[:, None])
        return self

    def as_mask(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.cache.k.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]

    def others(self, h: torch.Tensor) -> torch.Tensor | None:
        return None if self.waiting is None else self.cache.frozen.flatten(0, 1).index_select(0, self.waiting)

    def write(self, layer, k, v) -> None:
        self.cache.k[layer].flatten(0, 1).index_copy_(0, self.at, k)
        self.cache.v[layer].flatten(0, 1).index_copy_(0, self.at, v)

    def attend(self, layer, q, k, v) -> torch.Tensor:
        """Queries (n, H, C) over the rows' slots, after k and v (n + m, K, C) took theirs -> (n, H C)."""
        self.write(layer, k, v)
        keys, values = self.cache.k[layer], self.cache.v[layer]
        n, H, C = q.shape
        q = q.view(n, k.shape[1], -1, C)  # the heads of a group stand in for the query axis, so K/V stay uncopied
        if self.alone:  # reads no other row's padding, and copies nothing
            out = torch.cat([F.scaled_dot_product_attention(
                q[i : i + 1], keys[row : row + 1, :end].transpose(1, 2), values[row : row + 1, :end].transpose(1, 2))
                for i, (row, end) in enumerate(self.each)])
            return out.reshape(n, H * C)
        keys, values = keys[:, : self.reach], values[:, : self.reach]
        if self.run is not None:
            keys, values = keys.index_select(0, self.run), values.index_select(0, self.run)
        out = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=self.mask)
        return out.reshape(n, H * C)


class Graphs:
    """CUDA graphs of decoding, one for each segment and number of slots, captured when first met (in blocks of SLOTS).

    A graph has fixed shapes, so every row of the cache runs it. What frozen and empty rows compute is thrown away: the
    stream here, the keys and values when `pending` next names the row's token. On a GPU a step of few rows waits for
    weights and launches, not for arithmetic, so these rows cost little. On a CPU the same runs without a capture.
    """

    SLOTS = 256

    def __init__(self):
        self.captured = {}  # they read the tensors of the one cache that has these graphs
        self.pool = self.side = None

    def run(self, cache: Cache, segment: int, blocks, layers: range, h, running: torch.Tensor) -> torch.Tensor:
        """Streams (R, D) before a segment -> after it; rows that are not `running` (R,) keep theirs."""
        S, runs = cache.k.shape[2], send(running, h.device)[:, None]
        length = send(cache.length.clamp(max=S - 1), h.device)
        row, slot = (send(x, h.device) for x in cache.pending(segment, running.nonzero()[:, 0]))
        if len(row):
            waiting, streams = NextTokens(cache, row, slot, S), cache.frozen[row, slot]
            for layer in layers:
                waiting.write(layer, *blocks[layer].self_attn.keys_values(
                    blocks[layer].input_layernorm(streams), waiting.cos, waiting.sin))

        def forward(h, length):
            every = NextTokens.of_all(cache, length, reach)
            for layer in layers:
                h = blocks[layer](h, None, every, layer)
            return h

        reach = min(S, -(-(int(cache.length[running].max()) + 1) // self.SLOTS) * self.SLOTS)
        if not h.is_cuda:
            out = forward(h, length)
        else:
            if (segment, reach) not in self.captured:
                given, graph = (h.clone(), length.clone()), torch.cuda.CUDAGraph()
                self.pool = self.pool or torch.cuda.graph_pool_handle()  # no graph's insides outlive its replay
                self.side = self.side or torch.cuda.Stream()
                self.side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.side):
                    forward(*given)  # kernels are chosen and workspaces made outside the capture
                torch.cuda.current_stream().wait_stream(self.side)
                with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
                    out = forward(*given)
                self.captured[segment, reach] = graph, given, out
            graph, given, out = self.captured[segment, reach]
            for mine, value in zip(given, (h, length), strict=True):
                mine.copy_(value)
            graph.replay()
        return torch.where(runs, out, h)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, H, K, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = C
        self.q_proj = Linear(D, H * C, bias=config.attention_bias)
        self.k_proj = Linear(D, K * C, bias=config.attention_bias)
        self.v_proj = Linear(D, K * C, bias=config.attention_bias)
        # Qwen2 biases q, k and v only; Qwen3's attention_bias, where set, covers the output too.
        self.o_proj = Linear(H * C, D, bias=config.attention_bias and config.model_type == "qwen3")
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(C, config.rms_norm_eps)
            self.k_norm = RMSNorm(C, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (n, heads, C)

    def keys_values(self, x, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed streams (m, D) -> keys and values (m, K, C)."""
        return rotate(self.k_norm(self.split(self.k_proj(x))), cos, sin), self.split(self.v_proj(x))

    def forward(self, x, n: int, layout, layer: int) -> torch.Tensor:
        """Normed streams (n + m, D), of which the first n ask and all answer -> (n, D)."""
        q = rotate(self.q_norm(self.split(self.q_proj(x[:n]))), layout.cos[:n], layout.sin[:n])
        return self.o_proj(layout.attend(layer, q, *self.keys_values(x, layout.cos, layout.sin)))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, ffn, bias=False)
        self.up_proj = Linear(D, ffn, bias=False)
        self.down_proj = Linear(ffn, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h, others, layout, layer: int) -> torch.Tensor:
        """Streams (n, D) that run this layer -> (n, D). `others` (m, D) or None are frozen streams, which only give
        their keys and values, by the layer's ordinary projections; `layout` knows where each stands."""
        x = self.input_layernorm(h if others is None else torch.cat([h, others]))
        h = h + self.self_attn(x, len(h), layout, layer)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """The checkpoint's `model.` half: embedding, blocks, final norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.recompute = False  # activation checkpointing of the blocks: L x B x T x D kept instead of all inside them
        self.graphs = False  # CUDA graphs in decoding
        self.source, self.revision = None, None

    def stream(self, ids, stops=(), gate=None, cache: Cache | None = None, rows=None, source=None) -> torch.Tensor:
        """Residual stream after the last layer that each position runs, before the final norm: ids (B, T) -> (B, T, D).

        At depth 0 and at each of `stops` gate(depth, h) sees the stream (B, T, D) and returns which positions (B, T)
        run the layers up to the next stop, or None for all. Those refused at depth 0 are absent (padding, empty rows);
        those refused later are frozen, and their keys and values still reach every layer. With a cache, ids (R, 1)
        continue its rows; with `rows` (B, G) too, they are right-padded prompts whose keys and values go to those
        rows. `source` (B, T): see Sequences.
        """
        (B, T), decoding = ids.shape, cache is not None and rows is None
        h = self.model.embed_tokens(ids).flatten(0, 1)  # (B T, D)
        tables = None if decoding else rope(T, self.config, h)
        present = None
        for segment, (start, stop) in enumerate(pairwise((0, *stops, self.config.num_hidden_layers))):
            running = gate(start, h.unflatten(0, (B, T))) if gate else None
            present = running if segment == 0 else present
            if decoding:
                running = torch.ones(B, dtype=torch.bool) if running is None else running[:, 0].cpu()
                if not running.any():  # and no later layer either: streams stay frozen
                    continue
                if cache.graphs:
                    h = cache.graphs.run(cache, segment, self.model.layers, range(start, stop), h, running)
                    continue
                layout = cache.layout(segment, running)
            else:
                layout = Sequences((B, T), tables, running, present, cache, rows, source)
            others = layout.others(h)
            part = h if layout.run is None else h.index_select(0, layout.run)
            for layer in range(start, stop):
                block = self.model.layers[layer]
                if self.recompute and torch.is_grad_enabled():
                    part = checkpoint(block, part, others, layout, layer, use_reentrant=False)
                else:
                    part = block(part, others, layout, layer)
            h = part if layout.run is None else h.index_copy(0, layout.run, part)
        if decoding:
            cache.advance(h, torch.arange(B) if present is None else present[:, 0].cpu().nonzero()[:, 0])
        return h.unflatten(0, (B, T))

    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        """The read-out W_U norm(h) that every exit and every lens shares: (..., D) -> (..., V)."""
        return self.lm_head(self.model.norm(h))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> logits (B, T, V)."""
        return self.unembed(self.stream(ids))

    @classmethod
    def from_pretrained(cls, name_or_path, revision=None, dtype=torch.float32, device="cpu") -> "Transformer":
        """Loads a local folder or a hub id: config.json and model.safetensors, whole or sharded with an index.

        Every parameter is materialised once, in `dtype` on `device`. Raises UserError for a checkpoint that is
        incomplete, damaged, or not exactly this architecture.
        """
        folder = resolve(name_or_path, revision)
        config = Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, dtype, device)
        model.source = str(name_or_path)
        # A hub snapshot's folder is named after the commit it holds.
        model.revision = folder.name if folder.parent.name == "snapshots" else revision
        return model.eval()


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; every shard that the index names must be there."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name]
        except (KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: no usable 'weight_map'; download the file again") from None
        if outside:
            raise UserError(f"{index}: shard name {outside[0]!r} points outside the folder")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder}: weight file(s) {', '.join(absent)} missing; download the checkpoint again")
    return [folder / name for name in names]


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype, device) -> None:
    """Fills a model built on the meta device. All names and shapes are compared before the first tensor is read."""
    wanted = dict(model.named_parameters())  # a tied head is the embedding's parameter and is not listed twice
    shards, found = shard_paths(folder), {}
    for path in shards:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or truncated ({error}); download it again") from None
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some writers store the tied copy too

    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    problems += [f"{name} has shape {found[name][1]}, not {tuple(p.shape)}"
                 for name, p in wanted.items() if name in found and found[name][1] != tuple(p.shape)]
    if problems:
        raise UserError(f"{folder} does not hold this architecture: " + "; ".join(problems))

    for path in shards:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in (name for name in file.keys() if name in found):
                module = model.get_submodule(name.rpartition(".")[0])
                setattr(module, name.rpartition(".")[2], nn.Parameter(file.get_tensor(name).to(dtype)))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
