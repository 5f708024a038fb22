"""Early exits: the policy over (depth, token) that both training stages and the sampler share.

Equation numbers are those of the README. Shapes: B sequences, T positions, N positions picked from a batch, D width,
V vocabulary, L layers, E exits. `depth` counts layers run (an exit's, or L); an `outcome` is its index, 0..E, the last
one the full stack. Depths stay on the host, which plans from them who runs which layers.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data.hub import UserError
from fast.chunks import TokenValues, in_chunks
from fast.linear import linear
from fast.packing import Sequences, send
from model import Transformer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---------------------------------------------------------------------------------------------- adapters and heads


class LoRALinear(nn.Module):
    """A linear layer, not trained, plus a trained low-rank update: y = W x + (alpha / r) B A x. B starts at zero."""

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        out_features, in_features = base.weight.shape
        # float32 masters, whatever the base's dtype; drawn on the host, so that they are alike on every device
        A = nn.init.kaiming_uniform_(torch.empty(r, in_features, dtype=torch.float32), a=math.sqrt(5))
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, dtype=torch.float32, device=base.weight.device))
        self.scale = alpha / r
        self.on = True  # off: the base model (adapters_off)
        self.rounded = None  # A and B in the base's dtype (adapters_rounded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, D_in) -> (n, D_out)
        y = linear(x, self.weight, self.bias)
        if self.on:
            A, B = self.rounded or (self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
            y.addmm_(linear(x, A), B.t(), alpha=self.scale)  # in place: y is written once less
        return y


def projections(model: Transformer) -> dict[str, nn.Module]:
    """The linear layers that get an adapter, by their names."""
    return {name: module for name, module in model.named_modules() if name.endswith(PROJECTIONS)}


class ExitHeads(nn.Module):
    """z_e = w_e · silu(U_e x + u_e) + b_e with `hidden` units, or z_e = w_e · x + b_e with none, of x = h / rms(h): the
    length of a stream grows by orders of magnitude with depth. b_e starts at -4, p_e at sigmoid(-4) = 0.018, so that
    few tokens leave an untrained policy: 5% of them at 3 exits, 12% at 7."""

    def __init__(self, exits: int, width: int, hidden: int, eps: float, device):
        super().__init__()
        self.eps, self.hidden = eps, hidden
        if hidden:
            self.up = nn.Parameter((torch.randn(exits, hidden, width) / math.sqrt(width)).to(device))
            self.up_bias = nn.Parameter(torch.zeros(exits, hidden, device=device))
        self.weight = nn.Parameter(torch.zeros(exits, hidden or width, device=device))
        self.bias = nn.Parameter(torch.full((exits,), -4.0, device=device))

    def forward(self, h: torch.Tensor, exit_idx: int) -> torch.Tensor:
        """Stream (..., D) at exit `exit_idx` -> exit logits z (...), in the heads' float32."""
        h = h.to(self.weight.dtype)
        scale = torch.rsqrt(h.pow(2).mean(-1) + self.eps)
        if not self.hidden:  # the scale commutes with the map, and scaling a number is cheaper than a stream
            return h @ self.weight[exit_idx] * scale + self.bias[exit_idx]
        x = F.silu(F.linear(h * scale[..., None], self.up[exit_idx], self.up_bias[exit_idx]))
        return x @ self.weight[exit_idx] + self.bias[exit_idx]


def exit_depths(n_layers: int, every: int | None = None) -> tuple[int, ...]:
    """The exitable depths: every 5 layers (2 in models under 20 layers), below L. Raises UserError if there is none."""
    if n_layers < 2:
        raise UserError("--exit-every: a model of one layer has no depth to leave at")
    if every is None:
        every = min(2 if n_layers < 20 else 5, n_layers - 1)
    if not 0 < every < n_layers:
        raise UserError(f"--exit-every {every}: a model of {n_layers} layers needs a stride from 1 to {n_layers - 1}")
    return tuple(range(every, n_layers, every))


def refuse_exits(exits: Sequence[int], L: int) -> None:
    """Raises UserError unless there are exits, ascending, below L."""
    if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] >= L:
        raise UserError(f"exits {list(exits)}: need ascending depths between 1 and {L - 1}")


# ------------------------------------------------------------------------------------------------------ the policy


class Pass(NamedTuple):
    """What one forward pass gives: the streams and logits behind every log-probability."""

    h: torch.Tensor  # (B, T, D) each position's stream at its own depth
    exit_logits: torch.Tensor  # (B, T, E); past a position's depth they read a frozen stream and mean nothing
    depths: torch.Tensor  # (B, T) on the host
    at_exits: list[torch.Tensor]  # E of (B, T, D): the stream at each exit, for lenses


class Policy(nn.Module):
    """A transformer that may exit early: base weights (never trained), LoRA adapters and exit heads (trained).

    It takes `model` over: projections are replaced where they are, so a model has one policy. Raises UserError for a
    second one, which would change the first.
    """

    def __init__(self, model: Transformer, exits: Sequence[int] | None = None, rank: int = 16,
                 alpha: float | None = None, head_width: int = 0):
        super().__init__()
        L = model.config.num_hidden_layers
        exits = exit_depths(L) if exits is None else exits
        refuse_exits(exits, L)
        if any(isinstance(module, LoRALinear) for module in projections(model).values()):
            raise UserError("this model has a policy already: load the model again for another one")
        self.model = model.requires_grad_(False)
        self.exits, self.n_layers, self.rank, self.alpha = tuple(exits), L, rank, float(alpha or 2 * rank)
        for name, base in projections(model).items():
            model.set_submodule(name, LoRALinear(base, rank, self.alpha))
        self.adapters = list(projections(model).values())
        self.device = model.lm_head.weight.device
        self.heads = ExitHeads(len(exits), model.config.hidden_size, head_width, model.config.rms_norm_eps, self.device)
        self.depth_of_outcome = torch.tensor([*exits, L])  # outcome -> depth

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, ids, depths=None, u=None, delta: float = 0.0, place=None, heads=None) -> Pass:
        """The forward pass of training and sampling, and the only point where a stream freezes: ids (B, T) -> Pass.

        depths (B, T), on the host: how many layers each position runs, an exit's depth or L (default: L); 0 where
            nothing stands, as in padding
        u (B, T, E), on the host: uniform numbers. With them depth L means undecided: such a position stops at the
            first exit with u_e < p_e = sigmoid(z_e + delta), or runs all; one given less runs just that, as without u.
            u above 1 (sample.NEVER) takes no exit
        place: runs a segment, the layers between two exits, for those still running. Sequences, the default: they
            attend to earlier positions in ids. A Cache: ids (R, 1) are its rows' next tokens, which attend to their
            rows
        heads: what gives the exit logits, in place of the policy's own: streams (B, T, D) and an exit's index -> (B, T)
        """
        L = self.n_layers
        place, heads = Sequences(ids.shape) if place is None else place, heads or self.heads
        depth = torch.full(ids.shape, L) if depths is None else depths
        h, at_exits, exit_logits = self.model.embed(ids), [], []
        for segment, (start, stop) in enumerate(pairwise((0, *self.exits, L))):
            if start:  # an exit: read its logit; draw whether to stop here, or obey
                at_exits.append(h)
                exit_logits.append(heads(h, segment - 1))
                if u is not None:
                    p = torch.sigmoid(exit_logits[-1] + delta).cpu()
                    depth = depth.masked_fill((depth == L) & (u[..., segment - 1] < p), start)
            # Who has stopped keeps its stream, and later layers still make its keys and values from it (model.Block).
            h = place.run(self.model, h, segment, range(start, stop), depth > start)
        return Pass(h, torch.stack(exit_logits, dim=-1), depth, at_exits)


@contextmanager
def adapters_off(policy: Policy, off: bool = True):
    """Inside, where `off`, and at full depth, the network is the base model bit for bit: the teacher of stage 1, and
    what both stages measure their token KL against."""
    before = [adapter.on for adapter in policy.adapters]
    for adapter in policy.adapters:
        adapter.on = adapter.on and not off
    try:
        yield policy
    finally:
        for adapter, on in zip(policy.adapters, before, strict=True):
            adapter.on = on


@contextmanager
def adapters_rounded(policy: Policy):
    """Inside, where nothing is trained, adapters are rounded to the base's dtype once, not for every token."""
    for adapter in policy.adapters:
        adapter.rounded = tuple(p.detach().to(adapter.weight.dtype) for p in (adapter.lora_A, adapter.lora_B))
    try:
        yield
    finally:
        for adapter in policy.adapters:
            adapter.rounded = None


# ----------------------------------------------------------------------------------------------- log-probabilities


def stick_breaking(log_p: torch.Tensor, log_not_p: torch.Tensor) -> torch.Tensor:
    """Eq. (S): log pi(e_m) = log p_m + sum_{n<m} log(1 - p_n); what is left goes to the full stack.

    log p and log (1 - p) of each exit (..., E) -> log-probabilities of the outcomes (..., E + 1). In log space, since
    a product of probabilities rounds to 0 or 1 where a head is sure, and its logarithm's gradient is then lost.
    """
    return F.pad(log_not_p.cumsum(-1), (1, 0)) + F.pad(log_p, (0, 1))


def logp_depth(policy: Policy, exit_logits: torch.Tensor, depths: torch.Tensor, delta: float) -> torch.Tensor:
    """log pi(l_t): exit logits (N, E) and depths (N,) -> (N,). Only logits at exits up to l_t count: (S) asks no
    further."""
    z = exit_logits + delta
    logp_outcome = stick_breaking(F.logsigmoid(z), F.logsigmoid(-z))
    outcome = send(torch.searchsorted(policy.depth_of_outcome, depths), policy.device)
    return logp_outcome.gather(-1, outcome[:, None])[:, 0]


def token_logits(model: Transformer, h: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """W_U norm(h) / temperature: (N, D) -> (N, V), multiplied in the base's dtype, then raised to float32 at least.
    Temperature 0, which takes the likeliest token, has no distribution to score by: it scores at temperature 1."""
    logits = model.unembed(h)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature in (0, 1) else logits / temperature


def token_logp_all(model: Transformer, h: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(W_U norm(h) / temperature): (N, D) -> (N, V)."""
    return torch.log_softmax(token_logits(model, h, temperature), dim=-1)


def kl(logp_all: torch.Tensor, logq_all: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_x p(x) (log p(x) - log q(x)), exact over the vocabulary: (N, V), (N, V) -> (N,). The plain
    way, against which fast.chunks.TokenValues is tested."""
    return (logp_all.exp() * (logp_all - logq_all)).sum(-1).clamp(min=0)


def joint_logp(policy: Policy, h, exit_logits, depths, tokens=None, base_h=None, *, temperature=1.0, delta=0.0,
               forward_kl=False):
    """Eq. (2): log pi(l_t, x_t) = log pi(l_t) + log softmax(W_U norm(h_t) / temperature)[x_t], its two terms apart, and
    the KL of (1) and (5).

    h (N, D) is each position's stream at its own depth, exit_logits (N, E), depths (N,), tokens (N,) the ids
    predicted there; base_h (N, D) is the base model's stream at full depth. Returns, each (N,): logp_exit, logp_token
    and token_kl = KL(policy's token distribution || base model's), the other way round with `forward_kl`, None where
    tokens or base_h are not given. Training scores at temperature 1, at which it samples.
    """

    def chunk(h, tokens, base_h):
        with torch.no_grad():
            base = None if base_h is None else token_logp_all(policy.model, base_h, temperature)
        # log p(x), and `kl` above of the softmax of these logits, in fewer passes over tables of N x V; uses `base` up.
        return TokenValues.apply(token_logits(policy.model, h, temperature), tokens, base, forward_kl)

    logp_token, token_kl = in_chunks(chunk, policy.model.config.vocab_size, h, tokens, base_h)
    return logp_depth(policy, exit_logits, depths, delta), logp_token, token_kl


# ------------------------------------------------------------------------------------- responses, laid out and scored


@dataclass
class Response:
    """A response to a prompt, as `sample.generate` draws it: what the training stages score."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)  # the eos that ended it among them: an action like the others
    depths: list[int] = field(default_factory=list)  # of each: the layers run, at the position before, to predict it
    logp_exit: list[float] = field(default_factory=list)  # of each, when it was drawn
    logp_token: list[float] = field(default_factory=list)
    finished: bool = False  # an eos came within max_new_tokens

    def __len__(self) -> int:
        return len(self.token_ids)

    def append(self, token: int, depth: int, logp_exit: float, logp_token: float) -> None:
        self.token_ids.append(token)
        self.depths.append(depth)
        self.logp_exit.append(logp_exit)
        self.logp_token.append(logp_token)


class Batch(NamedTuple):
    """Responses laid out for one parallel pass, each from its prompt's first token to its own last but one.

    Position t predicts the token at t + 1: so a prompt of P tokens and a response of T_i have T_i predicting positions
    P-1 .. P+T_i-2, N in the batch. Prompt positions before them never exit: nothing is generated there, so there is no
    depth to choose, and all that is generated may rely on a fully read prompt.
    """

    ids: torch.Tensor  # (B, T) right-padded
    depths: torch.Tensor  # (B, T) on the host: l_t where predicting, L in the prompt before; 0 where padded or shared
    row: torch.Tensor  # (N,) on the host: where the predicting positions are, by which `depths` is indexed
    position: torch.Tensor
    predicting: tuple[torch.Tensor, torch.Tensor]  # (row, position) on the device, for what lies there
    tokens: torch.Tensor  # (N,) the token predicted at each
    shared_from: torch.Tensor | None  # (B, T) on the host: see Sequences

    @property
    def place(self) -> Sequences:
        """Where Policy.forward runs the layers of this batch."""
        return Sequences(self.ids.shape, self.shared_from)


def collate(responses: Sequence[Response], n_layers: int, device="cpu") -> Batch:
    """Responses, padded on the right, as a Batch. A prompt that several responses have is run once, in the first one's
    row, but for its last token: that one predicts, so each row runs its own. What is padding follows from lengths: in
    many tokenizers its id is that of an eos, and an eos that was drawn must count."""
    lengths = [len(r.prompt_ids) + len(r) - 1 for r in responses]
    B, T = len(responses), max(lengths)
    ids, depths = torch.zeros(2, B, T, dtype=torch.long)
    predicts = torch.zeros(B, T, dtype=torch.bool)
    shared_from, first = torch.arange(B * T).view(B, T), {}
    for b, (r, length) in enumerate(zip(responses, lengths, strict=True)):
        last = len(r.prompt_ids) - 1
        ids[b, :length] = torch.tensor([*r.prompt_ids, *r.token_ids[:-1]])
        depths[b, :last] = n_layers
        depths[b, last:length] = torch.tensor(r.depths)
        predicts[b, last:length] = True
        if (same := first.setdefault(tuple(r.prompt_ids), b)) != b:
            depths[b, :last] = 0
            shared_from[b, :last] = shared_from[same, :last]
    row, position = predicts.nonzero(as_tuple=True)
    tokens = torch.tensor([token for r in responses for token in r.token_ids])
    return Batch(send(ids, device), depths, row, position, (send(row, device), send(position, device)),
                 send(tokens, device), shared_from if len(first) < B else None)


def micro_batches(policy: Policy, responses: Sequence[Response], size: int, share: slice = slice(None)):
    """Yields (index (n,), Batch) of at most `size` responses, those of like length together, so that little is padded;
    `index` are their places in `responses`. `share`, a slice of `responses`, is this process's part."""
    order = sorted(range(len(responses))[share], key=lambda i: len(responses[i].prompt_ids) + len(responses[i]))
    for i in range(0, len(order), size):
        part = order[i : i + size]
        yield torch.tensor(part), collate([responses[j] for j in part], policy.n_layers, policy.device)


def base_pass(policy: Policy, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The base model at full depth: final stream (N, D) and the E streams (N, D) at the exits, without gradient."""
    with torch.no_grad(), adapters_off(policy):
        out = policy(batch.ids, policy.n_layers * (batch.depths > 0), place=batch.place)
    return out.h[batch.predicting], [h[batch.predicting] for h in out.at_exits]


def per_response(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sums of values at the predicting positions over each response: (N, ...) -> (B, ...)."""
    return values.new_zeros(len(batch.ids), *values.shape[1:]).index_add(0, batch.predicting[0], values)


class Scores(NamedTuple):
    """What joint_logp returns of a batch, and the exit logits and depths that it came from."""

    logp_exit: torch.Tensor  # (N,), as the next two
    logp_token: torch.Tensor | None
    token_kl: torch.Tensor | None
    exit_logits: torch.Tensor  # (N, E)
    depths: torch.Tensor  # (N,) on the host


def score(policy: Policy, batch: Batch, base_h: torch.Tensor | None = None, tokens: bool = True, u=None,
          forward_kl: bool = False) -> Scores:
    """joint_logp of a batch, teacher-forced, at its recorded depths or, with `u`, at those that Policy.forward takes.
    Without `tokens`, logp_token is None."""
    out = policy(batch.ids, batch.depths, u, place=batch.place)
    exit_logits, depths = out.exit_logits[batch.predicting], out.depths[batch.row, batch.position]
    return Scores(*joint_logp(policy, out.h[batch.predicting], exit_logits, depths, batch.tokens if tokens else None,
                              base_h, forward_kl=forward_kl), exit_logits, depths)
