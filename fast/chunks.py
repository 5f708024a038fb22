"""Vocabulary-sized tables in pieces, and few passes over each: memory that does not grow with positions x vocabulary.

The plain way is function(h, *others) on all N positions at once, under autograd, with `exits.token_logp_all` and
`exits.kl`. Beside the products with the vocabulary, what such a table costs is the number of times it is read and
written; autograd's way from a KL back to the logits takes some ten.
"""

import torch

# Tables are built for at most this many (position, token) pairs at a time. On a CPU they should stay in its caches: a
# step of stage 1 is 1.3 times as fast as with 2^25 (bench/LOG.md).
CHUNK, CHUNK_CPU = 2**25, 2**22


class PerPosition(torch.autograd.Function):
    """Values (N, ...) of a function of streams h (N, D) and other tensors, piece by piece; if `training`, also their
    gradients by h.

    A value (N,) belongs to one position, so its gradient is one row (D,): formed at once while the piece's (n, V)
    tables are there, it is all that the backward pass needs. Parameters get no gradient: the read-out is not trained.
    """

    @staticmethod
    def forward(ctx, function, size, training, h, *others):
        values = gradients = None
        for i in range(0, max(1, len(h)), size):
            span = slice(i, i + size)
            with torch.set_grad_enabled(training):
                here = h[span].detach().requires_grad_(training)
                piece = function(here, *(None if t is None else t[span] for t in others))
                if values is None:  # whole at once: small pieces among the tables would scatter the heap
                    values = [None if v is None else v.new_empty(len(h), *v.shape[1:]) for v in piece]
                    gradients = [torch.empty_like(h) if training and v is not None else None for v in piece]
                for value, gradient, v in zip(values, gradients, piece, strict=True):
                    if v is not None:
                        value[span] = v.detach()
                    if gradient is not None:
                        gradient[span] = torch.autograd.grad(v.sum(), here, retain_graph=True)[0]
            del piece, v, here  # and their tables, before the next piece makes its own
        ctx.save_for_backward(*gradients)
        ctx.others = len(others)
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads):
        h = sum(g[:, None].to(row.dtype) * row for g, row in zip(grads, ctx.saved_tensors, strict=True)
                if row is not None)
        return None, None, None, h, *[None] * ctx.others


def in_chunks(function, vocab: int, h: torch.Tensor, *others):
    """function(h, *others), a tuple of values (N, ...), on pieces of (N, ...) tensors; others, and values, may be None.
    Only h (N, D) may want a gradient, and then every value must be (N,)."""
    size = max(1, (CHUNK_CPU if h.device.type == "cpu" else CHUNK) // vocab)
    return PerPosition.apply(function, size, torch.is_grad_enabled() and h.requires_grad, h, *others)


def kl_in_place(p: torch.Tensor, logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """exits.kl of tables (n, V), given p as well; leaves p (log q - log p) in logq."""
    return -logq.sub_(logp).mul_(p).sum(-1)


class TokenValues(torch.autograd.Function):
    """log p(x) and KL(p || q), or with `forward_kl` KL(q || p), of p = softmax(logits), at tokens x (n,) and another
    model's log q (n, V), which is used up; either may be None. Their gradients by the logits need no derivative of the
    softmax:

        d log p(x) = onehot(x) - p          d KL(p || q) = p (log p - log q - KL)          d KL(q || p) = p - q
    """

    @staticmethod
    def forward(ctx, logits, tokens, logq, forward_kl=False):
        ctx.set_materialize_grads(False)
        logp = torch.log_softmax(logits, -1)
        p = logp.exp() if logits.requires_grad or logq is not None else None
        logp_token = None if tokens is None else logp.gather(-1, tokens[:, None])[:, 0]
        if logq is None:
            kl = other = None
        elif forward_kl:
            other = logq.exp()
            kl = kl_in_place(other, logq, logp)
        else:
            kl, other = kl_in_place(p, logp, logq), logq  # which now holds p (log q - log p)
        ctx.save_for_backward(p, tokens, other, kl)
        ctx.forward_kl = forward_kl
        return logp_token, None if kl is None else kl.clamp(min=0)

    @staticmethod
    def backward(ctx, of_token, of_kl):
        p, tokens, other, kl = ctx.saved_tensors
        grad = 0
        if of_token is not None:
            grad = (p * -of_token[:, None]).scatter_add_(-1, tokens[:, None], of_token[:, None])
        if of_kl is not None:
            minus = other - p if ctx.forward_kl else (p * kl[:, None]).add_(other)
            grad = grad + minus.mul_(-of_kl[:, None])
        return grad, None, None, None
