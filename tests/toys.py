"""Toy models for the tests: small, no two sizes alike, every parameter random.

Fresh norms are all 1, fresh Qwen2 biases and a fresh LoRA's B all 0: with those, swapped or missing ones pass unseen.
H != K, C != D/H, V is prime, and eps and the RoPE base are far from their defaults, so that reading them matters.
"""

import torch
from torch import nn

from exits import Policy
from model import Config, Transformer

SIZES = dict(vocab_size=61, hidden_size=20, intermediate_size=28, num_hidden_layers=6, num_attention_heads=6,
             num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-3, max_position_embeddings=128)
KINDS = [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]  # (model_type, tied)


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
def toy_policy(seed: int = 0, exits=(2, 4), rank: int = 3, **changes) -> Policy:
    """A policy whose adapters change the base visibly, and whose heads take every exit now and then."""
    policy = Policy(toy_model(seed, **changes), exits, rank)
    generator = torch.Generator().manual_seed(seed + 1000)
    for _, p in sorted(policy.trained().items()):
        p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    for adapter in policy.adapters:
        adapter.lora_B.mul_(0.2)
    policy.heads.bias.sub_(1.0)
    return policy
