"""Values of vocabulary-sized tables by few passes, against the plain formulas under autograd."""

import pytest
import torch

import exits
from fast.chunks import TokenValues, kl_in_place
from tests.toys import assert_close


def tables(seed: int = 0, n: int = 5, V: int = 61):
    generator = torch.Generator().manual_seed(seed)
    logits, others = 3 * torch.randn(2, n, V, generator=generator, dtype=torch.double)
    return logits, torch.log_softmax(others, -1), torch.randint(V, (n,), generator=generator)


def plain(logits, tokens, logq, forward_kl):
    logp = torch.log_softmax(logits, -1)
    return (None if tokens is None else logp.gather(-1, tokens[:, None])[:, 0],
            None if logq is None else exits.kl(logq, logp) if forward_kl else exits.kl(logp, logq))


@pytest.mark.parametrize("forward_kl", [False, True])
@pytest.mark.parametrize("given", ["tokens", "kl", "both"])
def test_values_and_gradients_equal_the_plain_formulas(given, forward_kl):
    """Both training stages learn from these gradients alone, and no other test would see a term that is missing."""
    logits, logq, tokens = tables()
    tokens, logq = None if given == "kl" else tokens, None if given == "tokens" else logq
    results = []
    for function in (TokenValues.apply, plain):
        x = logits.clone().requires_grad_()
        values = [v for v in function(x, tokens, None if logq is None else logq.clone(), forward_kl) if v is not None]
        weights = [torch.linspace(-1, 2, len(v), dtype=torch.double) + i for i, v in enumerate(values)]
        alone = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in values]  # as the pieces ask for them
        together = torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, values, strict=True)), x)[0]
        results.append([*values, *alone, together])
    assert len(results[0]) == (5 if given == "both" else 3)
    for ours, wanted in zip(*results, strict=True):
        assert_close(ours, wanted, 1e-12)


def test_kl_of_a_distribution_to_itself_is_zero():
    """Adapters start without effect: a token KL of rounding noise would be logged, and an exit that changes nothing
    would not count as safe."""
    logits, _, _ = tables(n=7, V=997)
    logits = logits.float().requires_grad_()
    _, kl = TokenValues.apply(logits, None, torch.log_softmax(logits.detach(), -1))
    kl.sum().backward()
    assert (kl == 0).all() and (logits.grad == 0).all()


def test_a_student_sure_of_what_the_base_rules_out_is_moved_by_the_forward_kl_alone():
    """Why distill.py has --forward-kl: at one fixed depth such a token stayed as it was for hundreds of steps."""
    logits, base = torch.tensor([[40.0, 0, 0]]), torch.log_softmax(torch.tensor([[0, 18.0, 0]]), -1)
    for forward_kl, pull in ((False, 1e-12), (True, 1.0)):
        x = logits.clone().requires_grad_()
        TokenValues.apply(x, None, base.clone(), forward_kl)[1].backward()
        assert x.grad[0, 1].abs().item() == pytest.approx(pull, abs=1e-6)


def test_float32_sums_over_a_vocabulary_lose_nothing():
    """150,000 small terms are summed; a plain running sum would be off in the third digit of a small KL."""
    logits, _, _ = tables(n=4, V=151_936)
    logp = torch.log_softmax(logits, -1)
    logq = torch.log_softmax(logits + 0.02 * tables(seed=1, n=4, V=151_936)[0], -1)
    wanted = exits.kl(logp, logq)
    got = kl_in_place(logp.exp().float(), logp.float(), logq.float())
    assert (got / wanted - 1).abs().max() < 1e-3
