"""Stage 2 against enumeration and the reference."""

import itertools

import pytest
import torch

import rloo
from data.hub import UserError
from exits import base_pass, collate, score
from sample import generate
from tests.toys import assert_close, reference, responses, toy_policy

EOS, VOCAB, STEPS = 0, 2, 2
LAM, BETA = 0.7, 0.5
PROMPT = [1, 0]


def tiny_policy():
    policy = toy_policy(3, exits=(1, 2), rank=2, num_hidden_layers=3, vocab_size=VOCAB).double()
    for adapter in policy.adapters:
        adapter.lora_B.data.mul_(4)  # far from the base, so that the KL's gradient weighs
    return policy


def everything(prompt=PROMPT):
    """Every response of at most two tokens over 2 tokens and 3 depths; eos ends it."""
    one = list(itertools.product(range(VOCAB), (1, 2, 3)))
    ended, open_ = ([a for a in one if (a[0] == EOS) == end] for end in (True, False))
    actions = [[a] for a in ended] + [[a, b] for a in open_ for b in one]
    tokens, depths = ([[step[part] for step in a] for a in actions] for part in (0, 1))
    return responses([prompt] * len(actions), tokens, depths)


def task_reward(r):
    return float(r.token_ids[-1] == EOS and len(r) == 2)


def slow_scores(policy, rows):
    """The reference and, of each response, sum_t log pi(l_t, x_t) and mean_t KL_t."""
    slow = reference(policy)
    for name in policy.trained():
        slow.w[name.removeprefix("model.")].requires_grad_()
    scores = [slow.score(r.prompt_ids, r.token_ids, r.depths) for r in rows]
    return slow, [s[:2].sum() for s in scores], [s[2].mean() for s in scores]


def gradient(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


def slow_gradient(policy, slow, loss):
    return gradient(loss, [slow.w[name.removeprefix("model.")] for name in policy.trained()])


def expected_loss_gradients(policy, betas):
    """E[grad of rloo_loss] over all pairs of responses (two samples), weighted by their probability."""
    rows = everything()
    batch = collate(rows, 3)
    logp_exit, logp_token, token_kl, *_ = score(policy, batch, base_pass(policy, batch)[0])
    lengths = torch.tensor([len(r) for r in rows]).double()
    logp, mean_kl = rloo.per_response(logp_exit + logp_token, batch), rloo.per_response(token_kl, batch) / lengths
    rewards = rloo.reward(torch.tensor([task_reward(r) for r in rows]),
                          torch.tensor([sum(r.depths) for r in rows]) / lengths / 3, mean_kl.detach(), LAM, BETA)
    pairs = torch.cartesian_prod(*[torch.arange(len(rows))] * 2)
    p = logp.detach().exp()[pairs].prod(1)
    losses = [torch.vmap(lambda *pair, b=b: rloo.rloo_loss(*pair, b, STEPS, 2))(
        rloo.leave_one_out(rewards[pairs]), logp[pairs], mean_kl[pairs]) for b in betas]
    return [gradient(p @ loss, list(policy.trained().values())) for loss in losses]


def test_expected_gradient_is_the_exact_one():
    """If it fails, RLOO does not ascend eq. (1): a wrong baseline, a missing eos, a KL term lost or counted twice."""
    policy, rows = tiny_policy(), everything()
    slow, logp, mean_kl = slow_scores(policy, rows)
    objective, total = 0.0, 0.0
    for r, lp, kl in zip(rows, logp, mean_kl, strict=True):
        reward = task_reward(r) - LAM * sum(r.depths) / len(r) / 3 - BETA * kl
        objective, total = objective + lp.exp() * reward, total + lp.exp().item()
    assert total == pytest.approx(1.0, abs=1e-9)
    exact = slow_gradient(policy, slow, -objective / STEPS)
    ours, without_kl = expected_loss_gradients(policy, (BETA, 0.0))
    assert_close(ours, exact)
    assert (without_kl - exact).norm() > 0.1 * exact.norm()  # the referee sees the KL's own gradient missing


def test_the_last_line_tells_what_became_of_a_run():
    """Else a run that has got worse ends like any other."""
    rows = [{"accuracy": i / 20, "average_compute": 0.5, "length": 7.0, "kl": None if i else 1.0} for i in range(20)]
    assert rloo.trend(rows, "here") == ("from the first 2 to the last of 20 steps: accuracy 0.025 -> 0.925, "
                                        "average_compute 0.5 -> 0.5, length 7 -> 7, kl not finite")
    assert "length not finite" in rloo.trend([{"accuracy": 1.0}], "here")  # of a line that was damaged
    with pytest.raises(UserError, match="here: kl = 'x'"):
        rloo.trend([{"kl": "x"}], "here")
    assert rloo.trend(rows[:1], "here").startswith("from the first 1 to the last of 1 steps: accuracy 0 -> 0")


def test_leave_one_out_against_loops():
    """A baseline that includes the sample itself, or divides by the deviation, biases or rescales the gradient."""
    rewards = torch.randn(3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    got = rloo.leave_one_out(rewards)
    for p in range(3):
        for i in range(4):
            others = [rewards[p, j].item() for j in range(4) if j != i]
            assert got[p, i].item() == pytest.approx(rewards[p, i].item() - sum(others) / 3)


@pytest.mark.parametrize("micro_batch", [1, 4, 6])
def test_accumulated_gradient_is_that_of_the_loss(micro_batch):
    """The update must weigh each response's mean KL and summed log-probability as the loss does; accumulation that
    averages averages would weigh short micro-batches more."""
    policy = tiny_policy()
    rows = [row for pair in zip(everything()[5::5], everything([1])[1::5], strict=False) for row in pair][:6]
    assert {len(r) for r in rows} == {1, 2}
    advantages = torch.randn(6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    parts, mean_kl, _ = rloo.score_responses(policy, rows, micro_batch)
    rloo.accumulate_gradient(policy, parts, advantages, BETA, STEPS, len(rows))
    slow, logp, slow_kl = slow_scores(policy, rows)
    assert_close(mean_kl, torch.stack(slow_kl))
    loss = sum(-a * lp + BETA * kl for a, lp, kl in zip(advantages, logp, slow_kl, strict=True)) / (STEPS * 6)
    assert_close(torch.cat([p.grad.flatten() for p in policy.trained().values()]), slow_gradient(policy, slow, loss))


def test_drift_is_what_the_trainer_recomputes_less_what_was_sampled():
    """The first thing to look at when training misbehaves: an average, or one token left out, would hide it."""
    policy = tiny_policy()
    rows = generate(policy, [PROMPT, [1]], samples=3, max_new_tokens=4, eos_ids=[EOS])
    assert rloo.score_responses(policy, rows, 4)[2].max() < 1e-6
    rows[1].logp_token[-1] += 0.5
    rows[4].logp_exit[0] -= 0.25
    drift = rloo.score_responses(policy, rows, 4)[2]
    assert len(drift) == 2 * sum(map(len, rows))
    assert drift.sort().values[-3:].tolist() == pytest.approx([0.0, 0.25, 0.5], abs=1e-6)


def test_reward_is_equation_1():
    """Sign or normalisation slips in the reward train the wrong thing silently."""
    got = rloo.reward(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.25]), torch.tensor([0.1, 0.2]), 0.4, 2.0)
    assert got.tolist() == pytest.approx([1 - 0.2 - 0.2, -0.1 - 0.4])
