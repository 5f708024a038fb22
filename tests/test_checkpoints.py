"""A trained policy on disk and back, every file of it damaged in turn, and merged into its base."""

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import load_policy, merge, save_policy
from data.hub import UserError
from tests.toys import KINDS, PROMPTS, L, assert_close, edit, toy_model, toy_policy


@pytest.mark.parametrize("kind, tied", KINDS)
@pytest.mark.parametrize("head_width", [0, 5])
def test_a_saved_policy_loads_with_identical_outputs(kind, tied, head_width, tmp_path):
    """A run would be evaluated as another policy than the one that was trained."""
    changes = dict(model_type=kind, tie_word_embeddings=tied)
    policy = toy_policy(seed=5, exits=(1, 3, 4), rank=2, head_width=head_width, **changes)
    save_policy(policy, tmp_path)
    again = load_policy(toy_model(seed=5, **changes), tmp_path)
    assert (again.exits, again.rank, again.alpha) == ((1, 3, 4), 2, 4.0)
    ids, u = torch.tensor([PROMPTS[2] * 4]), torch.rand(1, 28, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = policy(ids, u=u), again(ids, u=u)
    assert torch.equal(ours.h, theirs.h) and torch.equal(ours.exit_logits, theirs.exit_logits)
    assert torch.equal(ours.depths, theirs.depths) and len(ours.depths.unique()) > 2
    assert again.trained().keys() == policy.trained().keys()
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 7 * L  # no base weights
    hidden = {"up", "up_bias"} if head_width else set()
    assert set(load_file(tmp_path / "exit_heads.safetensors")) == {"weight", "bias"} | hidden


def test_merged_weights_compute_what_adapters_did():
    """The exported checkpoint is the merged one."""
    policy, ids = toy_policy().double(), torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        apart = policy(ids).h
        merge(policy)
        assert not any(adapter.on for adapter in policy.adapters)
        assert_close(policy(ids).h, apart)


A = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize("name, change, told", [
    ("adapter_model.safetensors", lambda t: t.pop(A), f"missing {A}"),
    ("adapter_model.safetensors", lambda t: t.update({A + "x": t[A].clone()}), f"unexpected {A}x"),
    ("adapter_model.safetensors", lambda t: t.update({A: t[A][:, :-1].clone()}), f"{A} has shape (3, 19), not (3, 20)"),
    ("exit_heads.safetensors", lambda t: t.pop("bias"), "missing bias"),
    ("exit_heads.safetensors", lambda t: t.update({"bias": t["bias"][:1].clone()}), "bias has shape (1,), not (2,)"),
    ("exit_config.json", lambda c: c.update(exits=[2, 4, 5]), "up has shape (2, 5, 20), not (3, 5, 20)"),
    ("exit_config.json", lambda c: c.update(head_width=6), "up has shape (2, 5, 20), not (2, 6, 20)"),
    ("exit_config.json", lambda c: c.pop("head_width"), "unexpected up"),
    ("exit_config.json", lambda c: c.update(exits=[4, 9]), "exits [4, 9]"),
    ("exit_config.json", lambda c: c.pop("exits"), "exits"),
    ("adapter_config.json", lambda c: c.pop("r"), "'r'"),
    ("adapter_config.json", lambda c: c.update(r=4), "has shape"),
    ("adapter_config.json", lambda c: c.update(r=10**5), "lora_A.weight has shape"),
    ("adapter_config.json", lambda c: c.update(r="3"), "r = '3'"),
    ("adapter_config.json", lambda c: c.update(lora_alpha=0), "lora_alpha"),
    ("adapter_config.json", lambda c: c.update(use_rslora=True), "use_rslora"),
    ("exit_config.json", lambda c: c.update(exits=[4, 2]), "exits [4, 2]"),
    ("exit_config.json", lambda c: c.update(exits=[2, "4"]), "exits = "),
    ("exit_config.json", lambda c: c.update(exits=[]), "exits []"),
    ("exit_config.json", lambda c: c.update(num_hidden_layers=None), "num_hidden_layers"),
    ("exit_config.json", lambda c: c.update(base=3), "base"),
])
def test_a_policy_that_does_not_fit_is_refused_by_name(name, change, told, tmp_path):
    """A tensor that is skipped stays at its start, and the loaded policy is another one. Refused before anything is
    allocated, for a huge r would take all memory."""
    save_policy(toy_policy(), tmp_path)
    edit(tmp_path / name, change)
    model = toy_model()
    with pytest.raises(UserError) as error:
        load_policy(model, tmp_path)
    assert told in str(error.value) and not any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("changes, told", [
    (dict(num_hidden_layers=8), "6 layers"), (dict(hidden_size=24), "another base"), (dict(seed=1), "another base")])
def test_a_policy_of_another_model_is_refused(changes, told, tmp_path):
    """--model and the run folder are given apart and can disagree."""
    save_policy(toy_policy(), tmp_path)
    with pytest.raises(UserError, match=told):
        load_policy(toy_model(**changes), tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "exit_heads.safetensors",
                                  "exit_config.json"])
def test_a_missing_or_truncated_file_of_a_policy_is_named(name, tmp_path):
    """A run that was killed while it wrote."""
    path = tmp_path / "step-000001" / name
    path.parent.mkdir()
    save_policy(toy_policy(), path.parent)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], None):
        path.unlink()
        if content:
            path.write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_policy(toy_model(), tmp_path)
