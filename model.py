"""A dense Qwen2 / Qwen3 transformer in plain PyTorch that loads what the hub holds.

Module names are those of the Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight`), so loading is a
strict match of names and shapes. Shapes: B sequences, T positions, D width, H query heads, K key/value heads,
C head dim, S cache slots, V vocabulary, L layers.

Early exits need two things of a transformer, and both are here so that every caller shares them: a block leaves the
stream of positions that are not `running` untouched while still giving their keys and values, and the one loop over
the blocks asks a `gate` before each block which positions run it. Who decides is `exits.py`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.hub import UserError, read_json, resolve


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


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)  # cast before the weight, as Hugging Face does: it differs in bf16


def rope(positions: torch.Tensor, config: Config, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin tables (B, 1, T, C) of rotary positions (B, T), computed in float32."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angle = positions[..., None].float() * (1.0 / config.rope_theta**half)  # (B, T, C/2)
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Cache:
    """Keys and values of B rows, preallocated: 2 x L x B x K x S x C numbers.

    Row b's positions 0..length[b]-1 are filled. Rows are right-padded: a slot beyond a row's length may hold rubbish,
    which the attention mask hides and the row's own next token overwrites.
    """

    def __init__(self, config: Config, rows: int, slots: int, like: torch.Tensor):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.length = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.longest = 0  # max(length), known without asking the device

    def fill(self, length: torch.Tensor, longest: int) -> None:
        """Declares how many leading slots of each row (B,) hold its tokens."""
        self.length, self.longest = length, longest

    def select(self, rows: torch.Tensor, slots: int | None = None) -> None:
        """Keeps the given rows (a long index, repeats allowed), in that order, with room for `slots` positions."""
        grow = (0, 0, 0, (slots or self.k.shape[3]) - self.k.shape[3])
        self.k, self.v = F.pad(self.k[:, rows], grow), F.pad(self.v[:, rows], grow)
        self.length = self.length[rows]


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, H, K, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = C
        self.q_proj = nn.Linear(D, H * C, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, K * C, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, K * C, bias=config.attention_bias)
        # Qwen2 biases q, k and v only; Qwen3's attention_bias, where set, covers the output too.
        self.o_proj = nn.Linear(H * C, D, bias=config.attention_bias and config.model_type == "qwen3")
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(C, config.rms_norm_eps)
            self.k_norm = RMSNorm(C, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, heads, C)

    def keys_values(self, x, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed stream (B, T, D) -> keys and values (B, K, T, C)."""
        k = self.k_norm(self.split(self.k_proj(x))).transpose(1, 2)
        return rotate(k, cos, sin), self.split(self.v_proj(x)).transpose(1, 2)

    def attend(self, x, cos, sin, k, v, mask=None) -> torch.Tensor:
        """Queries from x (B, T, D) over k, v (B, K, S, C): causal where mask is None, else one query a row with
        mask (B, S), True where it may look."""
        q = rotate(self.q_norm(self.split(self.q_proj(x))).transpose(1, 2), cos, sin)  # (B, H, T, C)
        B, H, T, C = q.shape
        groups = H // k.shape[1]
        if mask is not None:  # one query: the query heads of a group stand in for the query axis, so K/V stay uncopied
            q = q.view(B, H // groups, groups, C)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).reshape(B, H, T, C)
        elif k.is_cuda and k.dtype != torch.float32:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # enable_gqa falls back to the slow kernel here: copying K and V is cheaper
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, ffn, bias=False)
        self.up_proj = nn.Linear(D, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h, cos, sin, running=None, cache=None, layer=0) -> torch.Tensor:
        """h (B, T, D) -> h (B, T, D). Positions where `running` (B, T) is False keep their stream: it is frozen.

        Keys and values come from every position, frozen or not, by the layer's ordinary projections of its own input.
        With a filled cache T is 1 and the rows that are not running skip query, attention and MLP altogether; over a
        whole sequence all positions are computed and the frozen ones then keep what they had.
        """
        x = self.input_layernorm(h)
        k, v = self.self_attn.keys_values(x, cos, sin)
        if cache is None or h.shape[1] > 1:
            if cache is not None:  # the prompt: right-padded rows, all starting at slot 0
                cache.k[layer, :, :, : h.shape[1]], cache.v[layer, :, :, : h.shape[1]] = k, v
            new = h + self.self_attn.attend(x, cos, sin, k, v)
            new = new + self.mlp(self.post_attention_layernorm(new))
            return new if running is None else torch.where(running[..., None], new, h)

        every = torch.arange(h.shape[0], device=h.device)
        cache.k[layer, every, :, cache.length], cache.v[layer, every, :, cache.length] = k[:, :, 0], v[:, :, 0]
        slots = cache.longest + 1
        k, v = cache.k[layer, :, :, :slots], cache.v[layer, :, :, :slots]
        mask = torch.arange(slots, device=h.device) <= cache.length[:, None]
        rows = every if running is None else running[:, 0].nonzero()[:, 0]
        if len(rows) == 0:
            return h
        if len(rows) < len(every):
            x, cos, sin, k, v, mask = x[rows], cos[rows], sin[rows], k[rows], v[rows], mask[rows]
        new = h[rows] + self.self_attn.attend(x, cos, sin, k, v, mask)
        new = new + self.mlp(self.post_attention_layernorm(new))
        return new if len(rows) == len(every) else h.index_copy(0, rows, new)


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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.recompute = False  # activation checkpointing of the blocks: L x B x T x D kept instead of all inside them
        self.source, self.revision = None, None

    def stream(self, ids: torch.Tensor, gate=None, cache: Cache | None = None) -> torch.Tensor:
        """Residual stream after the last block that each position runs, before the final norm: ids (B, T) -> (B, T, D).

        gate(l, h) is called with the stream after l layers, l = 0..L, and returns which positions (B, T) run layer l,
        or None for all (its answer at L is not used). Right-padded rows need no padding mask: attention is causal.
        """
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        if cache is not None:
            positions = positions + cache.length[:, None]
        h = self.model.embed_tokens(ids)
        cos, sin = rope(positions, self.config, h.dtype)
        for layer, block in enumerate(self.model.layers):
            running = gate(layer, h) if gate else None
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, cos, sin, running, use_reentrant=False)
            else:
                h = block(h, cos, sin, running, cache, layer)
        if gate:
            gate(len(self.model.layers), h)
        return h

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
