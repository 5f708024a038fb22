"""Responses laid out for a parallel pass: who predicts, what is shared, which micro-batch, and the base's streams."""

import torch

from exits import base_pass, collate, micro_batches, score
from tests.toys import PROMPTS, L, assert_close, reference, responses, toy_policy

# Of the prompts one is a single token, which leaves nothing to share, and one stands in a single row; two differ in
# their first token only.
SHARED = responses([[3, 9, 14, 2, 5], [8], [3, 9, 14, 2, 5], [7, 1, 4], [8], [3, 9, 14, 2, 5], [4, 9, 14, 2, 5]],
                   [[1, 2, 3], [4], [5], [6, 7], [8, 9, 10], [11, 12], [13]],
                   [[2, 6, 4], [2], [6], [4, 2], [4, 6, 6], [6, 6], [6]])


def test_collate_lays_out_predicting_positions_by_length_alone():
    """The padding id may be an eos that the policy chose: a mask from ids would drop the very action that ended it."""
    rows = responses([[5, 0], [0], [1, 2, 3]], [[0, 9, 0], [0], [7, 0]], [[2, 6, 4], [2], [6, 2]])
    batch = collate(rows, L)
    assert batch.ids.tolist() == [[5, 0, 0, 9], [0, 0, 0, 0], [1, 2, 3, 7]]
    assert batch.depths.tolist() == [[L, 2, 6, 4], [2, 0, 0, 0], [L, L, 6, 2]]
    assert batch.row.tolist() == [0, 0, 0, 1, 2, 2] and batch.position.tolist() == [1, 2, 3, 0, 2, 3]
    assert [x.tolist() for x in batch.predicting] == [batch.row.tolist(), batch.position.tolist()]
    assert batch.tokens.tolist() == [0, 9, 0, 0, 7, 0]
    assert batch.shared_from is None


def test_rows_of_one_prompt_share_its_positions_and_score_as_they_would_alone():
    """The copies' prompts run no layer, and neither values nor gradients may show it."""

    def gradient(parts):
        policy, values = toy_policy(1).double(), []
        for part in parts:
            batch = collate(part, L)
            *got, exit_logits, _ = score(policy, batch, base_pass(policy, batch)[0])
            (got[0] - 0.3 * got[1] + 0.7 * got[2]).sum().backward()
            values.append(torch.cat([torch.stack(got, -1), exit_logits], -1))
        return torch.cat(values), torch.cat([p.grad.flatten() for p in policy.trained().values()]), batch

    alone, slow, _ = gradient([[r] for r in SHARED])
    shared, fast, batch = gradient([SHARED])
    assert_close(shared, alone)  # past a position's depth exit logits mean nothing, but come from one frozen stream
    assert_close(fast, slow)
    assert (batch.depths > 0).sum(1).tolist() == [7, 1, 1, 4, 3, 2, 5]


def test_micro_batches_hold_every_response_once_with_those_of_like_length():
    """A response left out or read twice bends every gradient; mixed lengths are mostly padding."""
    policy, seen, longest = toy_policy(), [], []
    for index, batch in micro_batches(policy, SHARED, 3):
        assert len(index) <= 3
        assert batch.tokens.tolist() == [token for i in index for token in SHARED[i].token_ids]
        seen += index.tolist()
        longest.append(batch.ids.shape[1])
    assert sorted(seen) == list(range(7))
    assert longest == sorted(longest) and len(longest) == 3


def test_base_pass_gives_the_base_models_streams_at_every_exit():
    """Targets (3), (4) are lenses on the base model; read from the student they would chase themselves."""
    policy = toy_policy().double()
    batch = collate(responses(PROMPTS, [[1, 2, 3]] * 4, [[2, 4, 2]] * 4), L)  # the recorded depths must not matter
    base_h, lenses = base_pass(policy, batch)
    assert all(adapter.on for adapter in policy.adapters) and not base_h.requires_grad
    slow, wanted = reference(policy, base=True), []
    for prompt in PROMPTS:
        streams = slow.streams([*prompt, 1, 2], [L] * (len(prompt) + 2))
        wanted.append(torch.stack([streams[depth][len(prompt) - 1 :] for depth in (2, 4, 6)]))
    assert_close(torch.stack([*lenses, base_h]), torch.cat(wanted, 1))
