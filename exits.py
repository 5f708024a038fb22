"""Early exits: the policy over (depth, token) that both training stages and the sampler share.

Equation numbers are those of the README. Shapes: B sequences, T positions, N positions picked from a batch, D width,
V vocabulary, L layers, E exits (E+1 outcomes, the last one the full stack), R rows being sampled. `depth` counts
layers run (an exit, or L), `exit_idx` indexes 0..E.
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data.hub import UserError, read_json
from model import Cache, Graphs, Transformer, linear

# Vocabulary-sized tables are built for at most this many (position, token) pairs at a time. On a CPU they should stay
# in its caches: a step of stage 1 is 1.3 times as fast as with 2^25 (bench/LOG.md).
CHUNK, CHUNK_CPU = 2**25, 2**22
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NEVER = 2.0  # a uniform number that no exit probability exceeds


# ---------------------------------------------------------------------------------------------- adapters and heads


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: y = W x + (alpha / r) B A x. B starts at zero."""

    def __init__(self, linear: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        out_features, in_features = linear.weight.shape
        like = dict(device=linear.weight.device, dtype=torch.float32)  # float32 masters, whatever the base's dtype
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.on = alpha / r, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, D_in) -> (n, D_out)
        y = linear(x, self.weight, self.bias)
        if self.on:
            low = linear(x, self.lora_A.to(x.dtype))
            y.addmm_(low, self.lora_B.to(x.dtype).t(), alpha=self.scale)  # in place: y is written once less
        return y


class ExitHeads(nn.Module):
    """One linear map per exit on the RMS-normalised stream. Starts at p = sigmoid(-4) = 0.018 for every exit."""

    def __init__(self, exits: int, width: int, eps: float, device):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(exits, width, device=device))
        self.bias = nn.Parameter(torch.full((exits,), -4.0, device=device))

    def forward(self, h: torch.Tensor, exit_idx: int) -> torch.Tensor:
        """Stream (..., D) at exit `exit_idx` -> exit logits z (...), in float32."""
        h = h.float()
        scale = torch.rsqrt(h.pow(2).mean(-1) + self.eps)
        return h @ self.weight[exit_idx] * scale + self.bias[exit_idx]


def exit_depths(n_layers: int, every: int | None = None) -> tuple[int, ...]:
    """The exitable depths: every 5 layers (2 in models under 20 layers), below L. Raises UserError if there is none."""
    if every is None:
        every = min(2 if n_layers < 20 else 5, max(1, n_layers - 1))
    if not 0 < every < n_layers:
        raise UserError(f"--exit-every {every}: a model of {n_layers} layers needs a stride from 1 to {n_layers - 1}")
    return tuple(range(every, n_layers, every))


class Pass(NamedTuple):
    """What one forward pass gives: the streams and logits behind every log-probability."""

    h: torch.Tensor  # (B, T, D) each position's stream at its own depth
    exit_logits: torch.Tensor  # (B, T, E); past a position's depth they read a frozen stream and mean nothing
    depths: torch.Tensor  # (B, T)
    streams: list[torch.Tensor]  # E of (B, T, D): the stream at each exit, for lenses


class Policy(nn.Module):
    """A transformer that may exit early: base weights (frozen), LoRA adapters and exit heads (trained)."""

    def __init__(self, model: Transformer, exits: Sequence[int], rank: int = 16, alpha: float | None = None):
        super().__init__()
        L = model.config.num_hidden_layers
        if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] >= L:
            raise UserError(f"exits {list(exits)}: need ascending depths between 1 and {L - 1}")
        self.model = model.requires_grad_(False)
        self.exits, self.n_layers, self.rank, self.alpha = tuple(exits), L, rank, float(alpha or 2 * rank)
        for block in model.model.layers:
            for part in (block.self_attn, block.mlp):
                for name in PROJECTIONS:
                    if hasattr(part, name):
                        setattr(part, name, LoRALinear(getattr(part, name), rank, self.alpha))
        self.adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
        self.device = model.lm_head.weight.device
        self.heads = ExitHeads(len(exits), model.config.hidden_size, model.config.rms_norm_eps, self.device)
        self.outcomes = torch.tensor([*exits, L], device=self.device)  # exit_idx -> depth

    def exit_idx(self, depths: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.outcomes, depths)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, ids, depths=None, u=None, delta: float = 0.0, cache: Cache | None = None, source=None) -> Pass:
        """The one place where a stream freezes: ids (B, T) -> Pass.

        depths (B, T) prescribes how many layers each position runs (default: all); 0 means that nothing stands there
        (padding, an empty row of the cache, a prompt that stands in another row: `source`, as in Batch). With
        uniforms u (B, T, E), the positions whose depth is L draw it instead, exit by exit: p_e = sigmoid(z_e + delta)
        against u_e. With a cache, ids (R, 1) continue its rows.
        """
        L = self.n_layers
        closed = depths is None and u is None
        depth = torch.full_like(ids, L) if depths is None else depths
        streams, exit_logits = [], []

        def gate(start: int, h: torch.Tensor) -> torch.Tensor | None:
            nonlocal depth
            if start:
                e = len(streams)
                streams.append(h)
                exit_logits.append(self.heads(h, e))
                if u is not None:
                    p = torch.sigmoid(exit_logits[e] + delta)
                    depth = depth.masked_fill((depth == L) & (u[..., e] < p), start)
            return None if closed else depth > start

        h = self.model.stream(ids, self.exits, gate, cache, source=source)
        return Pass(h, torch.stack(exit_logits, dim=-1), depth, streams)


@contextmanager
def adapters_off(policy: Policy):
    """Inside, and without exits, the network is the base model bit for bit: teacher and reference policy."""
    before = [adapter.on for adapter in policy.adapters]
    for adapter in policy.adapters:
        adapter.on = False
    try:
        yield policy
    finally:
        for adapter, on in zip(policy.adapters, before, strict=True):
            adapter.on = on


@torch.no_grad()
def merge(policy: Policy, sign: int = 1) -> None:
    """Adds the adapters' product to the base weights and switches the adapters off."""
    for a in policy.adapters:
        a.weight += (sign * a.scale * (a.lora_B @ a.lora_A)).to(a.weight.dtype)
        a.on = sign < 0


def unmerge(policy: Policy) -> None:
    """Takes the product out again and switches the adapters on. Exact up to rounding in the weights' dtype."""
    merge(policy, sign=-1)


# ---------------------------------------------------------------------------------------- log-probabilities


def stick_breaking(log_p: torch.Tensor, log_not_p: torch.Tensor) -> torch.Tensor:
    """Eq. (S): log pi(e_i) = log p_i + sum_{j<i} log(1 - p_j); what is left goes to the full stack.

    log p and log (1 - p) of each exit (..., E) -> log-probabilities of the outcomes (..., E+1).
    """
    return F.pad(log_not_p.cumsum(-1), (1, 0)) + F.pad(log_p, (0, 1))


def token_logp_all(model: Transformer, h: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(W_U norm(h) / temperature) in float32: (N, D) -> (N, V). Temperature 0 scores at temperature 1."""
    logits = model.unembed(h).float()
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, dim=-1)


def kl(logp_all: torch.Tensor, logq_all: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_x p(x) (log p(x) - log q(x)), exact over the vocabulary: (N, V), (N, V) -> (N,)."""
    return (logp_all.exp() * (logp_all - logq_all)).sum(-1).clamp(min=0)


class PerPosition(torch.autograd.Function):
    """Values (N, ...) of a function of streams h (N, D) and other tensors, piece by piece; if `training`, also their
    gradients by h.

    A value (N,) belongs to one position, so its gradient is one row (D,): formed at once while the piece's (n, V)
    tables are there, it is all that the backward pass needs. Parameters get no gradient: the read-out is frozen.
    """

    @staticmethod
    def forward(ctx, function, size, training, h, *others):
        values = gradients = None
        for i, (here, *rest) in enumerate(zip(*(t.split(size) for t in (h, *others)), strict=True)):
            with torch.set_grad_enabled(training):
                here = here.detach().requires_grad_(training)
                piece = function(here, *rest)
                if values is None:  # whole at once: small pieces among the tables would scatter the heap
                    values = [v.new_empty(len(h), *v.shape[1:]) for v in piece]
                    gradients = [torch.empty_like(h) for _ in piece if training]
                at = slice(i * size, i * size + len(here))
                for value, v in zip(values, piece, strict=True):
                    value[at] = v.detach()
                for gradient, v in zip(gradients, piece, strict=False):  # no gradients but in training
                    gradient[at] = torch.autograd.grad(v.sum(), here, retain_graph=True)[0]
            del piece, v, here  # and their tables, before the next piece makes its own
        ctx.save_for_backward(*gradients)
        ctx.others = len(others)
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads):
        h = sum(g[:, None].to(row.dtype) * row for g, row in zip(grads, ctx.saved_tensors, strict=True))
        return None, None, None, h, *[None] * ctx.others


def in_chunks(function, vocab: int, h: torch.Tensor, *others):
    """function(h, *others) on pieces of (N, ...) tensors, so that memory does not grow with N x V -> values (N, ...).

    Only h (N, D) may want a gradient, and then every value must be (N,).
    """
    size = max(1, (CHUNK_CPU if h.device.type == "cpu" else CHUNK) // vocab)
    return PerPosition.apply(function, size, torch.is_grad_enabled() and h.requires_grad, h, *others)


def joint_logp(policy: Policy, h, exit_logits, depths, tokens, teacher_h=None, *, temperature=1.0, delta=0.0, u=None):
    """Eq. (2): log pi(l_t, x_t) = log pi(l_t) + log softmax(W_U norm(h_t) / temperature)[x_t], and the KL of (1), (5).

    h (N, D) is each position's stream at its own depth, exit_logits (N, E), depths (N,), tokens (N,) the ids
    predicted there; teacher_h (N, D) is the base model's stream at full depth. Returns, each (N,):
    logp_exit, logp_token and token_kl = KL(policy's token distribution || teacher's). Without tokens, or without
    teacher_h, there is None in place of what they would give.

    With uniforms u (N,) it samples before it scores: `tokens` is filled with the draws (argmax at temperature 0).
    """
    z = exit_logits + delta
    outcomes = stick_breaking(F.logsigmoid(z), F.logsigmoid(-z))
    logp_exit = outcomes.gather(-1, policy.exit_idx(depths)[:, None])[:, 0]

    def score(h, *others):
        given = dict(zip(names, others, strict=True))
        logp_all, values = token_logp_all(policy.model, h, temperature), []
        if "u" in given:
            given["tokens"].copy_(draw(logp_all, given["u"]) if temperature else logp_all.argmax(-1))
        if "tokens" in given:
            values.append(logp_all.gather(-1, given["tokens"][:, None])[:, 0])
        if "teacher_h" in given:
            with torch.no_grad():
                teacher = token_logp_all(policy.model, given["teacher_h"], temperature)
            values.append(kl(logp_all, teacher))
        return values

    others = {"tokens": tokens, "teacher_h": teacher_h, "u": u}
    names = [name for name, value in others.items() if value is not None]
    values = iter(in_chunks(score, policy.model.config.vocab_size, h, *(others[name] for name in names)))
    return (logp_exit, *(None if value is None else next(values) for value in (tokens, teacher_h)))


# ------------------------------------------------------------------------------------------------- random draws


def uniforms(seed: Sequence[int], rows, positions, count: int, device="cpu") -> torch.Tensor:
    """Uniform numbers in [0, 1) that depend only on (seed, row, position, index), never on the batch around them.

    rows and positions broadcast against each other to some shape; returns float64 of that shape + (count,).
    SplitMix64's finaliser (Steele et al. 2014), once for each part of the address.
    """
    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    key = np.uint64(0)
    rows, positions = np.asarray(rows)[..., None], np.asarray(positions)[..., None]
    with np.errstate(over="ignore"):
        for part in (*seed, rows, positions, np.arange(count)):
            key = mix((key ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((key >> np.uint64(11)) * 2.0**-53).to(device)


def draw(logp_all: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF samples (N,) of log-probabilities (N, V) at uniforms u (N,); sums in float64: V can be 150,000."""
    cdf = logp_all.exp().cumsum(-1, dtype=torch.double)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logp_all.shape[-1] - 1)


# --------------------------------------------------------------------------------------- sampling and scoring


class Batch(NamedTuple):
    """Prompts and responses laid out for one parallel pass. N predicting positions: P-1 .. P+T_i-2 of each row."""

    ids: torch.Tensor  # (B, T) right-padded
    depths: torch.Tensor  # (B, T) L outside the predicting positions, 0 at padding and where `source` is elsewhere
    where: tuple[torch.Tensor, torch.Tensor]  # row and position of the N predicting positions: index (B, T, ...) by it
    tokens: torch.Tensor  # (N,) the token predicted at each
    source: torch.Tensor | None  # (B, T) the flat position that stands for each: a prompt's first row for the others


def collate(prompts, responses, depths=None, *, n_layers: int, device="cpu") -> Batch:
    """Lists of prompt ids, response ids and (optionally) depths, one a generated token -> Batch.

    A prompt that several rows have is run once, up to its last token: that one predicts. The mask comes from lengths
    alone: a padding id may well be an eos that the policy chose.
    """
    B, T = len(prompts), max(len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(B, T, dtype=torch.long)
    depth = torch.zeros(B, T, dtype=torch.long)
    where = torch.zeros(B, T, dtype=torch.bool)
    source, first = torch.arange(B * T).view(B, T), {}
    for b, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[b, : len(p) + len(r) - 1] = torch.tensor([*p, *r[:-1]])
        depth[b, : len(p) + len(r) - 1] = n_layers
        span = slice(len(p) - 1, len(p) + len(r) - 1)
        where[b, span] = True
        if depths is not None:
            depth[b, span] = torch.as_tensor(depths[b])
        if (same := first.setdefault(tuple(p), b)) != b:
            depth[b, : len(p) - 1] = 0
            source[b, : len(p) - 1] = source[same, : len(p) - 1]
    tokens = torch.tensor([token for r in responses for token in r])
    return Batch(ids.to(device), depth.to(device), where.to(device).nonzero(as_tuple=True), tokens.to(device),
                 source.to(device) if len(first) < B else None)


def batch_of(policy: Policy, rows: list[dict]) -> Batch:
    """collate of records: a row holds prompt_ids, token_ids and, once sampled from the policy, depths."""
    depths = [row["depths"] for row in rows] if "depths" in rows[0] else None
    return collate([row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows], depths,
                   n_layers=policy.n_layers, device=policy.device)


def micro_batches(policy: Policy, rows: list[dict], size: int):
    """(number of the first row, rows, Batch) of at most `size` rows at a time, rows of like length together. The order
    depends on the rows alone."""
    rows = sorted(rows, key=lambda row: len(row["prompt_ids"]) + len(row["token_ids"]))
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        yield i, part, batch_of(policy, part)


def teacher_pass(policy: Policy, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The base model at full depth: final stream (N, D) and the E streams (N, D) at the exits, without gradient."""
    with torch.no_grad(), adapters_off(policy):
        out = policy(batch.ids, depths=policy.n_layers * (batch.depths > 0), source=batch.source)
    return out.h[batch.where], [h[batch.where] for h in out.streams]


def score(policy: Policy, batch: Batch, teacher_h: torch.Tensor | None = None):
    """Teacher-forced joint_logp of a batch at its recorded depths: logp_exit, logp_token, token_kl, each (N,), and
    the exit logits (N, E)."""
    out = policy(batch.ids, depths=batch.depths, source=batch.source)
    exit_logits = out.exit_logits[batch.where]
    h, depths = out.h[batch.where], batch.depths[batch.where]
    return *joint_logp(policy, h, exit_logits, depths, batch.tokens, teacher_h), exit_logits


@dataclass
class Samples:
    """R sampled responses, right-padded to the longest, T. Only the first lengths[r] entries of a row count."""

    tokens: torch.Tensor  # (R, T)
    depths: torch.Tensor  # (R, T)
    logp_exit: torch.Tensor  # (R, T) at sampling time
    logp_token: torch.Tensor  # (R, T)
    lengths: torch.Tensor  # (R,) the eos that ended a response is counted
    finished: torch.Tensor  # (R,) whether an eos came within max_new_tokens

    def cut(self) -> "Samples":
        """Without the columns that no response reaches."""
        longest = int(self.lengths.max())
        return Samples(*(value[:, :longest] if value.ndim == 2 else value for value in vars(self).values()))


def cache_bytes(policy: Policy, slots: int) -> int:
    """Memory of one cache row: slots x (2 L K C + D) numbers in the base's dtype."""
    return slots * Cache.numbers(policy.model.config) * policy.model.lm_head.weight.element_size()


def fitting_rows(policy: Policy, slots: int) -> int:
    """Cache rows in half of the memory that is free now, at most 256. The rest is for prefill, read-out, and a copy of
    half of the rows when the last of them end."""
    if policy.device.type == "cuda":
        held = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        free = torch.cuda.mem_get_info(policy.device)[0] + held
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(256, free // 2 // cache_bytes(policy, slots)))


@torch.no_grad()
def generate(policy: Policy, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int,
             eos_ids: Sequence[int], temperature: float = 1.0, delta: float = 0.0, depths=None,
             seed: Sequence[int] = (0,), first_row: int = 0, batch_size: int | None = None, progress=None) -> Samples:
    """Samples `samples` responses to each prompt; rows of the result are prompt-major.

    Exits are drawn with offset `delta`, unless `depths` prescribes them: an int for every token, or (R,
    max_new_tokens). Row r's randomness is that of (seed, first_row + r, position), so neither batch_size nor the other
    prompts change its sample. At most batch_size responses are in the cache at a time (but one prompt's samples at
    least; default: what `fitting_rows` says): as they end, the next prompts take their rows. `progress`, a tqdm bar,
    counts ended responses. Raises UserError for a prompt that is empty or leaves no room in the model's context.
    """
    context = policy.model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= context - max_new_tokens:
            raise UserError(f"prompt {i} has {len(prompt)} tokens: it must have one at least, and leave room for "
                            f"--max-new-tokens {max_new_tokens} in a context of {context}; shorten either")
    if max_new_tokens < 1 or samples < 1 or not prompts:
        raise UserError("at least 1 prompt, 1 sample and 1 new token are needed")
    total = len(prompts) * samples
    if depths is not None:
        depths = torch.as_tensor(depths).expand(total, max_new_tokens)
        if not torch.isin(depths[depths != 0], policy.outcomes.cpu()).all():  # recorded depths are padded with 0
            raise UserError(f"prescribed depths must be among {policy.outcomes.tolist()}")
    device, E, eos_ids = policy.device, len(policy.exits), torch.tensor(eos_ids)
    kinds = (torch.long, torch.long, torch.float, torch.float)
    out = Samples(*(torch.zeros(total, max_new_tokens, dtype=kind) for kind in kinds),
                  torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.bool))

    slots = max(len(prompt) for prompt in prompts) - 1 + max_new_tokens
    R = samples * min(len(prompts), max(1, (batch_size or fitting_rows(policy, slots)) // samples))
    cache = Cache(policy.model.config, R, slots, E + 1, policy.model.lm_head.weight)
    cache.graphs = Graphs() if policy.model.graphs else None
    holds = torch.full((R,), -1)  # the response that each row of the cache holds, -1 if none
    token = torch.zeros(R, dtype=torch.long)  # its last token
    admitted = 0  # prompts
    while True:
        free = (holds < 0).nonzero()[:, 0]
        # A prompt's samples enter together and share its prefill; a few prompts at a time, for few passes.
        count = min(len(free) // samples, len(prompts) - admitted)
        if count and (8 * len(free) >= R or count == len(prompts) - admitted):
            rows = free[: count * samples].view(count, samples)
            prefill(policy, prompts[admitted : admitted + count], cache, rows)
            token[rows] = torch.tensor([prompt[-1] for prompt in prompts[admitted : admitted + count]])[:, None]
            holds[rows.flatten()] = torch.arange(admitted * samples, (admitted + count) * samples)
            admitted += count
        elif admitted == len(prompts) and 2 * len(free) >= len(holds):
            keep = (holds >= 0).nonzero()[:, 0]
            if not len(keep):
                return out.cut()
            cache.select(keep)
            holds, token = holds[keep], token[keep]

        live = (holds >= 0).nonzero()[:, 0]
        at = holds[live]
        step = out.lengths[at]
        depth = torch.zeros(len(holds), dtype=torch.long)  # an empty row runs no layer
        depth[live] = policy.n_layers if depths is None else depths[at, step]
        u = torch.full((len(holds), E + 1), NEVER, dtype=torch.double)
        u[live] = uniforms(seed, first_row + at, cache.length[live], E + 1)
        u, drawn = u.to(device), live.to(device)
        h, exit_logits, depth, _ = policy(token[:, None].to(device), depth[:, None].to(device),
                                          u[:, None, :E] if depths is None else None, delta, cache)
        h, exit_logits, depth = h[drawn, 0], exit_logits[drawn, 0], depth[drawn, 0]
        tokens = torch.zeros_like(depth)
        logp_exit, logp_token, _ = joint_logp(policy, h, exit_logits, depth, tokens, temperature=temperature,
                                              delta=delta, u=u[drawn, E])
        for buffer, value in ((out.tokens, tokens), (out.depths, depth), (out.logp_exit, logp_exit),
                              (out.logp_token, logp_token)):
            buffer[at, step] = value.cpu().to(buffer.dtype)
        token[live] = out.tokens[at, step]
        out.lengths[at] += 1
        out.finished[at] = torch.isin(token[live], eos_ids)
        ended = out.finished[at] | (out.lengths[at] == max_new_tokens)
        holds[live[ended]] = -1
        if progress is not None:
            progress.update(int(ended.sum()))


def prefill(policy: Policy, prompts: list[list[int]], cache: Cache, rows: torch.Tensor) -> None:
    """Runs each prompt but for its last token at full depth, once for all the cache rows (P, G) that continue it."""
    length = torch.tensor([len(prompt) - 1 for prompt in prompts])
    if length.max() > 0:
        ids = torch.zeros(len(prompts), int(length.max()), dtype=torch.long)
        for b, prompt in enumerate(prompts):
            ids[b, : len(prompt) - 1] = torch.tensor(prompt[:-1])
        there = torch.arange(ids.shape[1]) < length[:, None]
        policy.model.stream(ids.to(policy.device), gate=lambda *_: there.to(policy.device), cache=cache,
                            rows=rows.to(policy.device))
    cache.admit(rows, length)


# ------------------------------------------------------------------------------------------------- save and load


def save_policy(policy: Policy, folder: Path) -> None:
    """Writes the adapter as a PEFT folder, and the exit heads beside it. Base weights are not written."""
    model = policy.model
    adapter = {f"base_model.model.{name}.weight": p.detach().contiguous().cpu()
               for name, p in model.named_parameters() if "lora_" in name}
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.source,
        "revision": model.revision, "r": policy.rank, "lora_alpha": policy.alpha, "lora_dropout": 0.0,
        "target_modules": list(PROJECTIONS), "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "inference_mode": True})
    heads = {name: p.detach().cpu() for name, p in policy.heads.named_parameters()}
    save_file(heads, folder / "exit_heads.safetensors", metadata={"format": "pt"})
    write_json(folder / "exit_config.json", {"exits": policy.exits, "num_hidden_layers": policy.n_layers})


def load_policy(model: Transformer, folder: Path) -> Policy:
    """The policy that save_policy wrote, on `model`. Raises UserError unless every name and shape fits."""
    folder = Path(folder)
    exit_config, lora = read_json(folder / "exit_config.json"), read_json(folder / "adapter_config.json")
    try:
        if exit_config["num_hidden_layers"] != model.config.num_hidden_layers:
            raise UserError(f"{folder}: trained on a model of {exit_config['num_hidden_layers']} layers, but --model "
                            f"{model.source} has {model.config.num_hidden_layers}")
        policy = Policy(model, exit_config["exits"], lora["r"], lora["lora_alpha"])
    except KeyError as missing:
        raise UserError(f"{folder}: field {missing} is missing from exit_config.json or adapter_config.json") from None
    adapter = {f"base_model.model.{name}.weight": p for name, p in model.named_parameters() if "lora_" in name}
    fill(adapter, folder / "adapter_model.safetensors")
    fill(dict(policy.heads.named_parameters()), folder / "exit_heads.safetensors")
    return policy


@torch.no_grad()
def fill(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copies a safetensors file into tensors of the same names and shapes. Raises UserError naming what differs."""
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error})") from None
    problems = [f"missing {name}" for name in tensors.keys() - saved.keys()]
    problems += [f"unexpected {name}" for name in saved.keys() - tensors.keys()]
    problems += [f"{name} has shape {tuple(saved[name].shape)}, not {tuple(tensors[name].shape)}"
                 for name in tensors.keys() & saved.keys() if saved[name].shape != tensors[name].shape]
    if problems:
        raise UserError(f"{path} does not fit the model: " + "; ".join(sorted(problems)))
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
