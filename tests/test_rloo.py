"""Stage 2 against enumeration and nested loops."""

import argparse
import itertools

import pytest
import torch

import rloo
from exits import collate, score, teacher_pass
from model import Sequences, rope
from tests.toys import toy_policy

EOS, VOCAB, STEPS = 0, 3, 2
LAM, BETA = 0.7, 0.5
PROMPT = [2, 1]


def tiny_policy():
    policy = toy_policy(3, exits=(1, 2), rank=2, num_hidden_layers=3, vocab_size=VOCAB)
    for adapter in policy.adapters:
        adapter.lora_B.data.mul_(4)  # far from the base, so that the KL's gradient weighs
    return policy


def responses():
    """Every response of at most two tokens over 3 tokens and 3 depths: (tokens, depths). eos ends it."""
    for first, d1 in itertools.product(range(VOCAB), (1, 2, 3)):
        if first == EOS:
            yield [first], [d1]
        else:
            for second, d2 in itertools.product(range(VOCAB), (1, 2, 3)):
                yield [first, second], [d1, d2]


def task_reward(tokens):
    return float(tokens[-1] == EOS and len(tokens) == 2)


def slow_walk(policy, tokens, depths, prompt=PROMPT):
    """log pi and the KLs of one response by hand: one sequence, plain products, no code of exits.py's scoring."""
    ids = prompt + tokens[:-1]
    depth = [3] * (len(prompt) - 1) + depths
    model = policy.model

    def walk(depth, heads):
        h = model.model.embed_tokens(torch.tensor([ids]))
        layout = Sequences((1, len(ids)), rope(len(ids), model.config, h))
        p = []
        for layer, block in enumerate(model.model.layers):
            if heads and layer in (1, 2):
                unit = h / (h.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
                p.append(torch.sigmoid(unit @ policy.heads.weight[layer - 1] + policy.heads.bias[layer - 1])[0])
            new = block(h[0], None, layout, layer)[None]
            h = torch.stack([new[0, t] if depth[t] > layer else h[0, t] for t in range(len(ids))])[None]
        return torch.softmax(model.lm_head(model.model.norm(h))[0], dim=-1), p

    student, p = walk(depth, True)
    for adapter in policy.adapters:
        adapter.on = False
    with torch.no_grad():
        base, _ = walk([3] * len(ids), False)
    for adapter in policy.adapters:
        adapter.on = True
    probability, kls = torch.ones(()), []
    for t, (token, d) in enumerate(zip(tokens, depths, strict=True), start=len(prompt) - 1):
        exit_p = {1: p[0][t], 2: (1 - p[0][t]) * p[1][t], 3: (1 - p[0][t]) * (1 - p[1][t])}[d]
        probability = probability * exit_p * student[t, token]
        kls.append((student[t] * (student[t] / base[t]).log()).sum())
    return probability, torch.stack(kls).mean()


def gradient(policy, loss):
    names = list(policy.trained())
    grads = torch.autograd.grad(loss, list(policy.trained().values()), allow_unused=True, retain_graph=True)
    assert all(g is not None for g in grads), [n for n, g in zip(names, grads, strict=True) if g is None]
    return torch.cat([g.flatten() for g in grads])


def expected_loss_gradients(policy, betas):
    """E[grad of rloo_loss] over all pairs of responses (k = 2), weighted by their probability under the policy."""
    every = list(responses())
    batch = collate([PROMPT] * len(every), [t for t, _ in every], [d for _, d in every], n_layers=3)
    logp_exit, logp_token, token_kl, _ = score(policy, batch, teacher_pass(policy, batch)[0])
    logp = rloo.per_row(logp_exit + logp_token, batch)
    lengths = torch.tensor([float(len(t)) for t, _ in every])
    mean_kl = rloo.per_row(token_kl, batch) / lengths
    rewards = rloo.reward(torch.tensor([task_reward(t) for t, _ in every]),
                          torch.tensor([sum(d) / len(d) / 3 for _, d in every]), mean_kl.detach(), LAM, BETA)
    p, losses = logp.detach().exp(), []
    for i, j in itertools.product(range(len(every)), repeat=2):
        pair = torch.tensor([i, j])
        advantage = rloo.leave_one_out(rewards[pair][None]).flatten()
        losses.append([p[i] * p[j] * rloo.rloo_loss(advantage, logp[pair], mean_kl[pair], b, STEPS, 2) for b in betas])
    return [gradient(policy, sum(loss)) for loss in zip(*losses, strict=True)]


def test_expected_gradient_is_the_exact_one():
    """If it fails, RLOO does not ascend eq. (1): a wrong baseline, a missing eos, a KL term lost or counted twice."""
    policy = tiny_policy()
    objective, total = 0.0, 0.0
    for tokens, depths in responses():
        probability, mean_kl = slow_walk(policy, tokens, depths)
        R = task_reward(tokens) - LAM * sum(depths) / len(depths) / 3 - BETA * mean_kl
        objective, total = objective + probability * R, total + probability.item()
    assert total == pytest.approx(1.0, abs=1e-5)
    exact = gradient(policy, -objective / STEPS)
    ours, without_kl = expected_loss_gradients(policy, (BETA, 0.0))
    assert (ours - exact).norm() < 1e-4 * exact.norm()
    assert (without_kl - exact).norm() > 0.1 * exact.norm()  # the referee sees the KL's own gradient missing


def test_leave_one_out_against_loops():
    """A baseline that includes the sample itself, or divides by the deviation, biases or rescales the gradient."""
    rewards = torch.randn(3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    got = rloo.leave_one_out(rewards)
    for p in range(3):
        for i in range(4):
            others = [rewards[p, j].item() for j in range(4) if j != i]
            assert got[p, i].item() == pytest.approx(rewards[p, i].item() - sum(others) / 3)


def test_equal_rewards_give_zero_advantage():
    """A group without variance must be silent, not NaN."""
    assert torch.equal(rloo.leave_one_out(torch.full((2, 3), 0.25)), torch.zeros(2, 3))


def rows_of(policy, n=6):
    every = list(responses())[5::7][:n]
    return [{"prompt_ids": PROMPT if i % 2 else [1], "token_ids": t, "depths": d, "task": task_reward(t),
             "logp_exit": [0.0] * len(t), "logp_token": [0.0] * len(t)} for i, (t, d) in enumerate(every)]


def test_micro_batches_leave_the_gradient_unchanged():
    """Gradient accumulation that averages averages would weigh short micro-batches more."""
    grads = []
    for micro in (1, 4, 6):
        policy = tiny_policy()
        args = argparse.Namespace(micro_batch=micro, lam=LAM, beta=BETA, k=3, max_new_tokens=STEPS)
        rows = rows_of(policy)
        teachers, _ = rloo.score_rows(policy, rows, args)
        rloo.accumulate_gradient(policy, rows, teachers, args)
        grads.append(torch.cat([p.grad.flatten() for p in policy.trained().values()]))
    assert grads[0].norm() > 0
    for other in grads[1:]:
        assert torch.allclose(grads[0], other, rtol=1e-4, atol=1e-6 * grads[0].norm().item())


def test_accumulated_gradient_is_the_losss():
    """The update must weigh each response's mean KL and summed log-probability as the loss does."""
    policy, loss = tiny_policy(), 0.0
    args = argparse.Namespace(micro_batch=4, lam=LAM, beta=BETA, k=3, max_new_tokens=STEPS)
    rows = rows_of(policy)
    teachers, _ = rloo.score_rows(policy, rows, args)
    rloo.accumulate_gradient(policy, rows, teachers, args)
    got = torch.cat([p.grad.flatten() for p in policy.trained().values()])
    for row in rows:
        probability, mean_kl = slow_walk(policy, row["token_ids"], row["depths"], row["prompt_ids"])
        assert row["mean_kl"] == pytest.approx(mean_kl.item(), rel=1e-3)
        loss = loss + (-row["advantage"] * probability.log() + BETA * mean_kl) / (STEPS * len(rows))
    slow = gradient(policy, loss)
    assert (got - slow).norm() < 1e-4 * slow.norm()


def test_reward_is_equation_1():
    """Sign or normalisation slips in the reward train the wrong thing silently."""
    got = rloo.reward(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.25]), torch.tensor([0.1, 0.2]), 0.4, 2.0)
    assert got.tolist() == pytest.approx([1 - 0.2 - 0.2, -0.1 - 0.4])


def test_every_seed_and_step_has_its_own_random_numbers(monkeypatch):
    """Else five seeds are one run, or every step draws the same numbers again."""
    seeds = []

    def stop(*_, seed, **options):
        seeds.append(seed)
        raise KeyError

    monkeypatch.setattr(rloo, "generate", stop)
    monkeypatch.setattr(rloo.runs, "prompt_ids", lambda *_: [])
    for seed, step in ((0, 0), (1, 0), (0, 1)):
        args = argparse.Namespace(seed=seed, k=2, max_new_tokens=1, rows=1, thinking=True)
        with pytest.raises(KeyError):
            rloo.roll_out(None, [], argparse.Namespace(eos_ids=[1]), step, args)
    assert len(set(seeds)) == 3
