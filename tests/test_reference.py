"""The slow policy against the transformers library and a table worked out by hand: nothing of ours."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.reference import Reference
from tests.toys import FIXTURES, GOLDEN


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_equal_transformers_golden_ones_at_full_depth_and_frozen(name):
    """Whatever the referee gets wrong, every other test would take for right. The golden frozen logits are those of
    transformers' own network, with hooks that put back the streams of tokens that have stopped."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    config = SimpleNamespace(**config, rope_theta=config["rope_parameters"]["rope_theta"])
    weights = load_file(FIXTURES / name / "model.safetensors")
    reference = Reference({key: value.double() for key, value in weights.items()}, config)
    golden = load_file(FIXTURES / name / "golden.safetensors")
    full, frozen = golden["logits"], golden["frozen_logits"]
    assert (full - frozen).abs().max() > 0.1 * full.abs().max()
    for depths, logits in ((torch.full_like(golden["depths"], 2), full), (golden["depths"], frozen)):
        for row, wanted in enumerate(logits):
            ours = reference.read_out(reference.streams(golden["ids"][row].tolist(), depths[row].tolist())[-1])
            assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_samples_and_scores_follow_a_table_given_by_hand(monkeypatch):
    """The first coin below its exit's probability says where to stop, and the die falls into one token's interval."""
    seen, p_token = [], torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])

    def table(self, ids, depths):
        seen.append((list(ids), list(depths)))
        return torch.tensor([0.25, 0.5]), p_token if self.lora_scale else p_token.flip(-1)  # the base's is another

    monkeypatch.setattr(Reference, "policy", table)
    reference = Reference({}, SimpleNamespace(num_hidden_layers=6), exits=(2, 4), lora_scale=1.0)
    dice = {1: (0.31, 0.24, 0.1), 2: (0.5, 0.25, 0.49), 3: (0.24, 0.9, 0.5)}
    assert reference.sample([7, 8], 3, dice.get) == ([2, 1, 0], [2, 4, 6])
    assert seen == [([7, 8], [6]), ([7, 8, 2], [6, 2]), ([7, 8, 2, 1], [6, 2, 4])]
    logp_exit, logp_token, kl = reference.score([7, 8], [2, 1, 0], [2, 4, 6])
    assert logp_exit.exp().tolist() == pytest.approx([0.25, 0.75 * 0.5, 0.75 * 0.5])
    assert logp_token.exp().tolist() == pytest.approx([0.7, 0.25, 0.25])
    base = [0.5, 0.25, 0.25]  # at full depth, whatever the policy's was
    assert kl.tolist() == pytest.approx([sum(p * math.log(p / q) for p, q in zip(row, base, strict=True))
                                         for row in p_token.tolist()])
    assert ([7, 8, 2], [6, 6]) in seen  # the base reads the same text at full depth
