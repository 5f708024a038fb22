"""The log-probabilities that both stages train on: eqs. (S) and (2), the KL, their gradient, and their chunks."""

import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fast.chunks
from exits import base_pass, collate, joint_logp, kl, score, stick_breaking
from sample import generate
from tests.reference import stick_breaking as slow_stick_breaking
from tests.toys import KINDS, PROMPTS, L, assert_close, reference, responses, toy_policy


def test_stick_breaking_equals_the_product_of_survivals():
    """Eq. (S): a wrong index here pays for the wrong exit everywhere."""
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double() * 4
    outcomes = stick_breaking(F.logsigmoid(z), F.logsigmoid(-z))
    for n in range(50):
        left = 1.0
        for e in range(4):
            p = 1 / (1 + math.exp(-z[n, e]))
            assert abs(math.exp(outcomes[n, e]) - left * p) < 1e-12
            left *= 1 - p
        assert abs(math.exp(outcomes[n, 4]) - left) < 1e-12
        assert_close(slow_stick_breaking(z[n].sigmoid()), outcomes[n].exp())


def test_stick_breaking_stays_finite_where_probabilities_round_to_nothing():
    """As a product of float32 probabilities, an exit at logit -200 would have log-probability -inf."""
    z = torch.tensor([[-200.0, 200.0], [200.0, -200.0]], requires_grad=True)
    outcomes = stick_breaking(F.logsigmoid(z), F.logsigmoid(-z))
    assert_close(outcomes, [[-200.0, 0, -200], [0, -400, -200]])
    outcomes.sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("temperature, delta", [(1.0, 0.0), (0.6, 1.5)])
def test_joint_probabilities_sum_to_one(temperature, delta):
    """Eq. (2) over the whole (depth, token) table, each depth prescribed in turn, after a prefix of mixed depths."""
    policy, total = toy_policy(vocab_size=13).double(), 0.0
    ids, before = [4, 12, 0, 7], [6, 2, 4]
    p_exit, p_token = reference(policy).policy(ids, before, temperature, delta)
    for i, depth in enumerate((2, 4, 6)):
        with torch.no_grad():
            out = policy(torch.tensor([ids]), torch.tensor([[*before, depth]]))
            h, z = out.h[0, -1].expand(13, -1), out.exit_logits[0, -1].expand(13, -1)
            logp_exit, logp_token, _ = joint_logp(policy, h, z, torch.full((13,), depth), torch.arange(13),
                                                  temperature=temperature, delta=delta)
        p = (logp_exit + logp_token).exp()
        assert_close(p, slow_stick_breaking(p_exit)[i] * p_token[i])
        total += float(p.sum())
    assert abs(total - 1) < 1e-12


def test_token_kl_equals_the_sum_over_the_vocabulary():
    """KL of (1) and (5): the direction and the exactness decide what the student learns and what RLOO pays."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 13, generator=generator).double().log_softmax(-1) for _ in range(2))
    wanted = [sum(math.exp(p) * (p - q) for p, q in zip(*rows, strict=True))
              for rows in zip(a.tolist(), b.tolist(), strict=True)]
    assert_close(kl(a, b), wanted)
    assert (kl(a, a.float().double()) >= 0).all()


@pytest.mark.parametrize("kind, tied", KINDS)
def test_score_and_its_gradient_equal_the_references(kind, tied):
    """Both training stages descend this gradient: through streams frozen at mixed depths, their keys and values, the
    heads, the read-out, and the exact KL to the base model, which reads the same tokens at full depth on its own."""
    policy = toy_policy(model_type=kind, tie_word_embeddings=tied, vocab_size=13).double()
    (r,) = responses([[4, 12, 9]], [[0, 7, 7, 1]], [[4, 2, 6, 4]])
    batch, slow = collate([r], L), reference(policy)
    names = {name: name.removeprefix("model.") for name in policy.trained()}
    for name in names.values():
        slow.w[name].requires_grad_()
    ours = score(policy, batch, base_pass(policy, batch)[0])[:3]
    wanted = slow.score(r.prompt_ids, r.token_ids, r.depths)
    weights = torch.tensor([1.0, -0.5, 2.0, 0.7]).double()
    for parts in (ours, wanted):
        (weights * (parts[0] + 0.5 * parts[1] + 0.3 * parts[2])).sum().backward()
    assert_close(torch.stack(ours), wanted)
    for name, p in policy.trained().items():
        assert slow.w[names[name]].grad.abs().max() > 0
        assert_close(p.grad, slow.w[names[name]].grad)


def test_joint_logp_gradient_equals_finite_differences():
    """A second referee for the gradient, which needs no autograd: central differences of the reference's values."""
    policy = toy_policy(vocab_size=13).double()
    slow, answer = reference(policy), ([4, 12], [0, 7], [4, 6])
    logp_exit, logp_token, *_ = score(policy, collate(responses(*([x] for x in answer)), L))
    (logp_exit + logp_token).sum().backward()
    for name, p in [*list(policy.trained().items())[::13], ("heads.weight", policy.heads.weight),
                    ("heads.up", policy.heads.up)]:
        index = tuple(int(i) for i in np.unravel_index(int(p.grad.abs().argmax()), p.shape))
        weight, ends = slow.w[name.removeprefix("model.")], []
        for step in (1e-5, -1e-5):
            weight[index] += step
            ends.append(float(slow.score(*answer)[:2].sum()))
            weight[index] -= step
        assert_close(p.grad[index], (ends[0] - ends[1]) / 2e-5, 1e-6)


# --------------------------------------------------------------------------------------------------- in chunks


def twenty_positions(vocab_size):
    policy = toy_policy(vocab_size=vocab_size).double()
    batch = collate(responses(PROMPTS, [[1, 2, 3, 4, 5]] * 4, [[2, 4, 6, 4, 2]] * 4), L)
    return policy, batch, base_pass(policy, batch)[0]


def test_chunked_equals_unchunked_in_values_draws_and_gradients(monkeypatch):
    """Vocabulary-sized work goes a few positions at a time, or long batches would not fit; no seam may show."""
    (policy, batch, base_h), results, sizes = twenty_positions(61), [], []
    plain = policy.model.unembed
    monkeypatch.setattr(policy.model, "unembed", lambda h: sizes.append(len(h)) or plain(h))
    for chunk in (2**25, 3 * 61 + 1, 1):
        monkeypatch.setattr(fast.chunks, "CHUNK_CPU", chunk)
        policy.zero_grad()
        sizes.clear()
        parts = score(policy, batch, base_h)[:3]
        sum(part.sum() for part in parts).backward()
        results.append((max(sizes), torch.stack(parts), [p.grad for p in policy.trained().values()],
                        generate(policy, PROMPTS, samples=5, max_new_tokens=6, eos_ids=[7, 8], seed=(1,))))
    whole = results[0]
    assert [result[0] for result in results] == [20, 3, 1]
    for _, parts, gradients, drawn in results[1:]:
        assert_close(parts, whole[1])
        for ours, wanted in zip(gradients, whole[2], strict=True):
            assert_close(ours, wanted)
        assert [(r.token_ids, r.depths) for r in drawn] == [(r.token_ids, r.depths) for r in whole[3]]


def test_chunks_keep_nothing_of_vocabulary_size_for_the_backward_pass(monkeypatch):
    """Peak memory would grow with T x V again: only streams may wait for the backward pass, not tables."""
    (policy, batch, base_h), saved = twenty_positions(997), []
    monkeypatch.setattr(fast.chunks, "CHUNK_CPU", 4 * 997)

    def pack(t):
        t = t.detach()  # an output that is saved would keep itself alive
        saved.append(weakref.ref(t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = score(policy, batch, base_h)
    waiting = [t for t in (ref() for ref in saved) if t is not None]
    tables = [t for t in waiting if t.ndim and t.shape[-1] == 997 and t.shape[0] != 20]  # (D, V) is the head itself
    assert kept and waiting and not tables
    assert len(waiting) < len(saved)  # tables there were
