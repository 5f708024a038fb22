"""E5 of monitor.py: what linear probes find in the streams that are kept, each at the depth its token stopped at.

Decodable is not used: a state may know of later tokens because they follow from the same text (arXiv 2404.00859). What
is used, E4 says.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data.text import thoughts
from exits import collate
from study.regimes import Subject, answers_of

AHEAD = (2, 5)
DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of a probe's weights, the strongest first: each starts from the one before
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def standard(x: torch.Tensor, fit: torch.Tensor) -> torch.Tensor:
    """Features (n, D) less their mean, over their deviation, both taken where `fit` (n,), and a constant."""
    some = x[fit]
    return torch.cat([(x - some.mean(0)) / some.std(0, correction=0).clamp(min=1e-6), x.new_ones(len(x), 1)], 1)


def softmax_probe(x: torch.Tensor, labels: torch.Tensor, fit: torch.Tensor, tune: torch.Tensor) -> torch.Tensor:
    """-log p (n,) of labels (n,) 0..C-1 by a linear softmax probe on x (n, D), trained where `fit`, under the weight
    decay that does best where `tune`: with one for all, an input of another width would lose for that alone."""
    x, C, best = standard(x, fit), int(labels.max()) + 1, None
    W = torch.zeros(x.shape[1], C, requires_grad=True)
    for decay in DECAYS:
        optimizer = torch.optim.LBFGS([W], max_iter=60, line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer, decay=decay):
            optimizer.zero_grad()
            loss = F.cross_entropy(x[fit] @ W, labels[fit]) + decay * W.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            nll = F.cross_entropy(x @ W, labels, reduction="none")
        if best is None or nll[tune].mean() < best[tune].mean():
            best = nll
    return best


def ridge_guess(x: torch.Tensor, labels: torch.Tensor, fit: torch.Tensor) -> torch.Tensor:
    """The class (n,) that ridge regression to one-hot labels gives, trained where `fit`."""
    x = standard(x, fit)
    some, wanted = x[fit], F.one_hot(labels, int(labels.max()) + 1).to(x.dtype)[fit]
    return (x @ torch.linalg.solve(some.T @ some + x.shape[1] * torch.eye(x.shape[1]), some.T @ wanted)).argmax(-1)


@torch.no_grad()
def kept_streams(s: Subject, responses) -> list[torch.Tensor]:
    """Of each response, the streams (T, D) that predicted its tokens, at the depths they stopped at."""
    found = []
    for i in range(0, len(responses), 64):
        batch = collate(responses[i : i + 64], s.policy.n_layers, s.policy.device)
        h = s.policy(batch.ids, batch.depths, place=batch.place).h[batch.predicting].float().cpu()
        found += h.split([len(r) for r in responses[i : i + 64]])
    return found


def future_gain(s: Subject, responses, h: list[torch.Tensor]) -> dict:
    """I_k = NLL(x_{t+k-1} | embeddings of x_{t-2}, x_{t-1}, x_t) - NLL(x_{t+k-1} | h_t), in nats; h_t is what predicts
    x_t. The baseline has that one, too, so that the next token alone is no foresight. Of eight problems probes learn
    from three, one sets their weight decay, and four are scored."""
    values, n, E = {}, len(responses), s.policy.model.model.embed_tokens.weight.detach().float().cpu()
    for k in AHEAD:
        states, nearby, labels, owner = [], [], [], []
        for i, (r, rows) in enumerate(zip(responses, h, strict=True)):
            text = torch.tensor([*r.prompt_ids[-2:], *r.token_ids])  # text[j + 1] is read where h[j] stands
            at = torch.arange(max(0, len(r) - k + 1))
            states.append(rows[at])
            nearby.append(torch.cat([E[text[at + j]] for j in range(3)], 1))
            labels.append(text[at + 1 + k])
            owner.append(torch.full((len(at),), i))
        states, nearby, labels, owner = map(torch.cat, (states, nearby, labels, owner))
        fit, tune = (owner % 2 == 0) & (owner % 8 > 0), owner % 8 == 0
        known = torch.isin(labels, labels[fit])  # a token never met in training tells nothing about a probe
        states, nearby, labels, owner, fit, tune = (x[known] for x in (states, nearby, labels, owner, fit, tune))
        if not (fit.any() and tune.any()):  # no response, or none of those that probes learn from, is long enough
            values[f"E5 future gain {k}"] = [np.nan] * n
            continue
        labels = labels.unique(return_inverse=True)[1]
        gain = softmax_probe(nearby, labels, fit, tune) - softmax_probe(states, labels, fit, tune)
        values[f"E5 future gain {k}"] = [float(gain[owner == i].mean()) if i % 2 else np.nan for i in range(n)]
    return values


def foreknowledge(s: Subject, responses, h: list[torch.Tensor]) -> dict:
    """K(f) = accuracy of probing the model's own answer (of a number, the first digit) from the state at the share f of
    its thoughts, less that with shuffled labels. Read it beside E2: knowledge in the state before it is in the text."""
    values, n = {}, len(responses)
    answers = answers_of(s, responses)
    there = torch.tensor([bool(a) and a[0].isalnum() for a in answers])  # an answer may be empty
    known = [(a[0] if a[0].isdecimal() else a) if ok else "" for a, ok in zip(answers, there.tolist(), strict=True)]
    labels = torch.tensor(list(map(sorted({*known}).index, known)))
    order = torch.from_numpy(np.random.default_rng(s.args.seed).permutation(n))
    ends = [(thoughts(s.tokenizer.pieces(r.token_ids)) or len(r)) - 1 for r in responses]
    for f in FRACTIONS:
        x = torch.stack([rows[int(f * end)] for rows, end in zip(h, ends, strict=True)])
        right = []
        for target in (labels, labels[order]):
            guess, half = torch.zeros(n, dtype=torch.long), torch.arange(n) % 2 == 0
            for fit in (half, ~half):  # each half is guessed by the other's probe
                guess = torch.where(fit, guess, ridge_guess(x, target, fit & there))
            right.append((guess == target).double())
        values[f"E5 answer known {round(100 * f)}"] = np.where(there, right[0] - right[1], np.nan)
    return values


def probes(s: Subject, responses) -> dict:
    h = kept_streams(s, responses)
    return future_gain(s, responses, h) | foreknowledge(s, responses, h)
