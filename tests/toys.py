"""Toy models for the tests: small, no two sizes alike, every parameter random.

Fresh norms are all 1, fresh Qwen2 biases and a fresh LoRA's B all 0: with those, swapped or missing ones pass unseen.
H != K, C != D/H, V is prime, and eps and the RoPE base are far from their defaults, so that reading them matters.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from exits import Policy, Response
from model import Config, Transformer
from tests.reference import Reference

L, EXITS = 6, (2, 4)
SIZES = dict(vocab_size=61, hidden_size=20, intermediate_size=28, num_hidden_layers=L, num_attention_heads=6,
             num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-3, max_position_embeddings=128)
KINDS = [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]  # (model_type, tied)
PROMPTS = [[5, 17, 42], [9], [3, 58, 21, 0, 7, 33, 11], [60, 2]]  # ragged; 0 is also the padding
FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = ["qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied", "llama-tied"]  # in float32


def toy_config(**changes) -> Config:
    """A 6-layer Qwen3 with tied embeddings, but for the fields given."""
    kind = changes.get("model_type", "qwen3")
    base = dict(model_type=kind, rope_theta=100.0, tie_word_embeddings=True, attention_bias=kind == "qwen2")
    return Config(**{**SIZES, **base, **changes})


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fills every parameter: norms around 1, biases around 0, matrices so that a unit input gives a unit output, and an
    embedding so small that the tied read-out keeps several tokens likely."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            noise = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
        else:
            noise = noise * (0.4 if "embed_tokens" in name else p.shape[-1] ** -0.5)
        p.copy_(noise)
    return module


def toy_model(seed: int = 0, **changes) -> Transformer:
    return randomise(Transformer(toy_config(**changes)), seed).eval()


@torch.no_grad()
def toy_policy(seed: int = 0, exits=EXITS, rank: int = 3, head_width: int = 5, **changes) -> Policy:
    """A policy whose adapters change the base visibly, and whose heads take every exit now and then."""
    policy = Policy(toy_model(seed, **changes), exits, rank, head_width=head_width)
    generator = torch.Generator().manual_seed(seed + 1000)
    for _, p in sorted(policy.trained().items()):
        p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    for adapter in policy.adapters:
        adapter.lora_B.mul_(0.2)
    policy.heads.bias.sub_(1.0)
    return policy


def toy_on(device: str, dtype=torch.float32, exits=EXITS, **changes) -> Policy:
    """The toy policy, made on a device as the scripts make theirs."""
    toy = toy_policy(exits=exits, **changes)
    policy = Policy(toy_model(**changes).to(dtype).to(device), exits, toy.rank, head_width=toy.heads.hidden)
    policy.load_state_dict(toy.state_dict())
    return policy


def set_heads(policy: Policy, bias: float) -> Policy:
    """Heads that ignore the stream: a bias far below 0 closes every exit, one far above opens them all."""
    with torch.no_grad():
        policy.heads.weight.zero_()
        policy.heads.bias.fill_(bias)
    return policy


def responses(prompts, tokens, depths) -> list[Response]:
    """As if they had been sampled, all with log-probability 0."""
    return [Response(prompt, ids, at, [0.0] * len(ids), [0.0] * len(ids))
            for prompt, ids, at in zip(prompts, tokens, depths, strict=True)]


def reference(policy: Policy, base: bool = False) -> Reference:
    """The slow policy with the same parameters, in float64; `base`: without the adapters, as the base model."""
    weights = {name.removeprefix("model."): p.detach().double().clone() for name, p in policy.named_parameters()}
    return Reference(weights, policy.model.config, policy.exits, 0.0 if base else policy.alpha / policy.rank)


def edit(path: Path, change) -> None:
    """Applies `change` to what a JSON or safetensors file holds."""
    value = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
    change(value)
    path.write_text(json.dumps(value)) if path.suffix == ".json" else save_file(value, path)


def assert_close(ours, wanted, tolerance: float = 1e-9) -> None:
    """The largest difference, as a share of the largest wanted value: what rounding leaves, whatever the kernel. 1e-9
    is for float64, where a kernel's order of sums shows at 1e-15 and any slip far above."""
    ours, wanted = (torch.as_tensor(x, dtype=torch.double).detach() for x in (ours, wanted))
    assert ours.shape == wanted.shape
    if wanted.numel():
        difference, largest = float((ours - wanted).abs().max()), float(wanted.abs().max())
        assert difference <= tolerance * largest, f"differ by {difference}, the largest being {largest}"


def replayed(program: dict, override: dict[int, int] | None = None) -> str:
    """Answer of a program of data/arithmetic.py; `override` replaces results of steps, and what follows uses them."""
    value = program["start"]
    for i, (op, n) in enumerate(program["ops"]):
        value = {"+": value + n, "-": value - n, "*": value * n}[op]
        value = (override or {}).get(i, value)
    return str(value)
