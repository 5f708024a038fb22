"""A dense Qwen2, Qwen3 or Llama transformer in plain PyTorch that loads what the hub holds.

Module names are those of the Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight`), so loading is a
strict match of names and shapes. Shapes: B sequences, T positions, D width, H query heads, K key/value heads,
C head dim, V vocabulary, L layers; n streams that run a layer, m frozen ones.

Inside the layers streams are packed, (n, D): norms, projections and MLPs don't care which sequence a row belongs to.
Attention does, and asks its `site`, which knows where each row stands: it has the rotary tables `cos` and `sin` (n + m,
1, C), the `frozen` streams (m, D) or None, and `attend`. The plain one, `Causal`, is here: whole sequences, causal
attention. The others are made by a *place*, which runs some layers for the streams that need them (Policy.forward):
`Packed` by `Sequences` (fast/packing.py), whole texts with frozen positions; `NextTokens` by `Cache` (fast/cache.py).
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.hub import read_json, resolve
from data.weights import config_fields, load_weights
from fast.linear import Linear

# Else cuBLAS may round partial sums to bfloat16 at some shapes, such as sampling's few rows, and not in scoring.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.set_float32_matmul_precision("highest")  # NVIDIA's containers may turn TF32 on, and heads are float32


@dataclass(frozen=True)
class Config:
    """The fields of a checkpoint's config.json that are read, under their Hugging Face names."""

    model_type: str  # qwen2, qwen3 or llama
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


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The weight stays outside: Qwen's and Llama's norms cast before they multiply, which differs in bfloat16.
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def rope(positions: int, config: Config, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables (positions, 1, C) of the rotary cos and sin, computed at least in float32. The first half of sin is
    negated, so that `rotate` need not negate half of every head."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, config.head_dim, 2, device=like.device, dtype=dtype) / config.head_dim
    angle = torch.arange(positions, device=like.device, dtype=dtype)[:, None] * (1.0 / config.rope_theta**exponent)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None].to(like.dtype), torch.cat([-sin, sin], -1)[:, None].to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Queries (B, T, H, C) over keys and values (B, T, K, C) -> (B T, H C)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if k.is_cuda and k.dtype != torch.float32:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:  # enable_gqa falls back to the slow kernel here: copying K and V is cheaper
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


class Causal:
    """The plain site: every position of whole sequences (B, T) runs, in order, n = B T."""

    frozen = None  # streams (m, D) that run no layer any more, and still give keys and values

    def __init__(self, shape, cos: torch.Tensor, sin: torch.Tensor):
        self.shape = shape
        self.cos, self.sin = cos.repeat(shape[0], 1, 1), sin.repeat(shape[0], 1, 1)  # (B T, 1, C)

    def attend(self, layer: int, q, k, v) -> torch.Tensor:
        """Queries (n, H, C) over keys and values (n, K, C) -> (n, H C)."""
        return causal_attention(*(x.unflatten(0, self.shape) for x in (q, k, v)))


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, H, K, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.head_dim = layer, C
        self.q_proj = Linear(D, H * C, bias=config.attention_bias)
        self.k_proj = Linear(D, K * C, bias=config.attention_bias)
        self.v_proj = Linear(D, K * C, bias=config.attention_bias)
        # Qwen2 biases q, k and v only; the others' attention_bias, where set, covers the output too.
        self.o_proj = Linear(H * C, D, bias=config.attention_bias and config.model_type != "qwen2")
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(C, config.rms_norm_eps)
            self.k_norm = RMSNorm(C, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (n, heads, C)

    def keys_values(self, x, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed streams (n, D) -> keys and values (n, K, C)."""
        return rotate(self.k_norm(self.split(self.k_proj(x))), cos, sin), self.split(self.v_proj(x))

    def forward(self, x: torch.Tensor, n: int, site) -> torch.Tensor:
        """Normed streams (n + m, D), all of which are attended to and the first n of which attend -> (n, D)."""
        q = rotate(self.q_norm(self.split(self.q_proj(x[:n]))), site.cos[:n], site.sin[:n])
        k, v = self.keys_values(x, site.cos, site.sin)
        return self.o_proj(site.attend(self.layer, q, k, v))


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
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h: torch.Tensor, site) -> torch.Tensor:
        """Streams (n, D) -> (n, D). The site's frozen streams (m, D) only give their keys and values, by this layer's
        ordinary projections of the stream as it was frozen."""
        x = self.input_layernorm(h if site.frozen is None else torch.cat([h, site.frozen]))
        h = h + self.self_attn(x, len(h), site)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """The checkpoint's `model.` half: embedding, blocks, final norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.recompute = False  # activation checkpointing: only the streams between blocks are kept for the backward
        self.graphs = False  # CUDA graphs in decoding
        self.shards = None  # fast.sharded.Shards, where every rank keeps a part of each block
        self.name, self.revision = None, None  # where the weights came from
        self.fingerprint = None  # checkpoints.fingerprint of them, taken before sharding scatters them

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> streams h^0 (B, T, D)."""
        return self.model.embed_tokens(ids)

    def run(self, h: torch.Tensor, layers: range, site) -> torch.Tensor:
        """Packed streams (n, D) through some of the layers."""
        for layer in layers:
            block = self.model.layers[layer]
            if self.shards is not None:
                self.shards.fetch(layer)
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, site, use_reentrant=False)
            else:
                h = block(h, site)
            if self.shards is not None:
                h = self.shards.in_backward(h, layer)
        return h

    def gathered(self):
        """Inside, a base that is shared out among processes is whole, where it fits: for sampling."""
        return nullcontext() if self.shards is None else self.shards.gathered()

    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        """The read-out W_U norm(h) that every exit and every lens shares: (..., D) -> (..., V)."""
        return self.lm_head(self.model.norm(h))

    def streams(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> final streams (B T, D), every position at full depth."""
        h = self.embed(ids).flatten(0, 1)
        return self.run(h, range(self.config.num_hidden_layers), Causal(ids.shape, *rope(ids.shape[1], self.config, h)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> logits (B, T, V), every position at full depth."""
        return self.unembed(self.streams(ids)).unflatten(0, ids.shape)

    @classmethod
    def from_pretrained(cls, name_or_path, revision=None, dtype=torch.float32, device="cpu") -> "Transformer":
        """Loads a local folder or a hub id. Raises UserError for a checkpoint that is incomplete, damaged, or not
        exactly this architecture."""
        where = resolve(name_or_path, revision, patterns=("*.json", "*.jinja")) / "config.json"
        config = Config(**config_fields(read_json(where), str(where)))  # which may refuse it before gigabytes come
        folder = resolve(name_or_path, revision)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, dtype, device)  # every parameter is materialised once
        model.name = str(name_or_path)
        # A hub snapshot's folder is named after the commit it holds.
        model.revision = folder.name if folder.parent.name == "snapshots" else revision
        return model.eval()
