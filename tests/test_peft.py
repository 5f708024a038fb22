"""The adapter folder against PEFT itself. PEFT loads with strict=False, so only equal logits prove a key was read."""

import pytest
import torch

from checkpoints import load_policy, save_policy
from tests.toys import KINDS, assert_close, randomise, toy_model, toy_policy

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT's call, not ours


def hf_copy(model):
    """The same toy as a transformers model."""
    c = model.config
    config_class = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[c.model_type]
    model_class = {"qwen2": transformers.Qwen2ForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}[c.model_type]
    hf = model_class(config_class(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_word_embeddings))
    hf.load_state_dict(model.state_dict())
    return hf.eval()


def assert_same_logits(ours, theirs, base):
    """To rounding, 1e-4 of the largest |logit|, where the adapter itself changes them by over 1%."""
    ids = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b, unadapted = ours(ids), theirs(ids).logits, base(ids)
    assert (a - unadapted).abs().max() > 0.01 * b.abs().max()
    assert_close(a, b, 1e-4)


@pytest.mark.parametrize("kind, tied", KINDS)
def test_our_adapter_folder_gives_equal_logits_in_peft(kind, tied, tmp_path):
    """A misspelt key or another scale loads without an error and gives the base model, or a bent one."""
    changes = dict(model_type=kind, tie_word_embeddings=tied)
    policy = toy_policy(**changes)
    save_policy(policy, tmp_path)
    theirs = peft.PeftModel.from_pretrained(hf_copy(toy_model(**changes)), str(tmp_path))
    assert_same_logits(policy.model, theirs, toy_model(**changes))


@pytest.mark.parametrize("kind, tied", KINDS)
def test_an_adapter_that_peft_wrote_loads_with_equal_logits(kind, tied, tmp_path):
    """Ours reads the same files: an adapter may come back from another trainer."""
    changes = dict(model_type=kind, tie_word_embeddings=tied)
    save_policy(toy_policy(**changes), tmp_path)  # for the exit heads, and as the adapter to be replaced
    theirs = peft.PeftModel.from_pretrained(hf_copy(toy_model(**changes)), str(tmp_path))
    with torch.no_grad():
        lora = torch.nn.ParameterDict({n.replace(".", "_"): p for n, p in theirs.named_parameters() if "lora_" in n})
        assert len(lora) == 2 * 7 * 6
        randomise(lora, seed=9)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_policy(toy_model(**changes), tmp_path).model, theirs, toy_model(**changes))
