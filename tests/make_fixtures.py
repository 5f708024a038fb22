"""Makes the golden fixtures with transformers: `python tests/make_fixtures.py` (5.23.0, torch 2.13.0).

Each folder is a checkpoint as transformers writes it, plus golden.safetensors with input ids, the logits that
transformers' own eager attention gives, and those it gives when tokens freeze at given depths. Every parameter is
randomised; C != D/H and K < H.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = dict(vocab_size=61, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-3, max_position_embeddings=128)
CLASSES = {"qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
           "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
           "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}
CHANGES = {"llama": {"attention_bias": True, "hidden_size": 24}}  # it refuses a width that its heads don't divide


def random_hf_model(kind: str, tied: bool, seed: int, **changes):
    """A transformers model of unequal sizes with every parameter random, norms and biases included."""
    config_class, model_class = CLASSES[kind]
    config = config_class(**{**SIZES, **changes}, tie_word_embeddings=tied, attn_implementation="eager",
                          rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                noise = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
            elif "embed_tokens" not in name:
                noise = noise / p.shape[-1] ** 0.5
            p.copy_(noise)
    return model


@torch.no_grad()
def frozen_logits(model, ids, depths):
    """The method in transformers' own network: after each layer a hook puts back the streams of the tokens that had
    stopped before it. Later keys and values of these are then made from the frozen stream by the library's code."""
    hooks = [layer.register_forward_hook(lambda _, args, new, i=i: torch.where(depths[..., None] > i, new, args[0]))
             for i, layer in enumerate(model.model.layers)]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits


def main() -> None:
    cases = [(kind, tied, torch.float32) for kind in ("qwen2", "qwen3") for tied in (True, False)]
    cases += [("qwen3", True, torch.bfloat16), ("llama", True, torch.float32)]
    for seed, (kind, tied, dtype) in enumerate(cases):
        model = random_hf_model(kind, tied, seed, **CHANGES.get(kind, {})).to(dtype)
        name = f"{kind}-{'tied' if tied else 'untied'}" + ("-bf16" if dtype == torch.bfloat16 else "")
        model.save_pretrained(FIXTURES / name)
        (FIXTURES / name / "generation_config.json").unlink(missing_ok=True)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, SIZES["vocab_size"], (2, 13), generator=generator)
        depths = torch.randint(1, 3, (2, 13), generator=generator)
        with torch.no_grad():
            logits = model(ids).logits
        save_file({"ids": ids, "logits": logits, "depths": depths, "frozen_logits": frozen_logits(model, ids, depths)},
                  FIXTURES / name / "golden.safetensors")


if __name__ == "__main__":
    main()
