"""Early exits against slow, independent code: a network of nested loops in float64, enumeration, counting.

The referee is `SlowNetwork`: one token, one head, one key at a time, straight from the README's description, sharing
nothing with model.py and exits.py but the parameters' names.
"""

import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import exits
import model
from data.hub import UserError
from exits import (
    ExitHeads,
    Policy,
    adapters_off,
    collate,
    draw,
    exit_depths,
    generate,
    joint_logp,
    kl,
    load_policy,
    merge,
    save_policy,
    score,
    stick_breaking,
    teacher_pass,
    uniforms,
    unmerge,
)
from model import Sequences
from tests.toys import KINDS, toy_model, toy_policy

L, EXITS = 6, (2, 4)
PROMPTS = [[5, 17, 42], [9], [3, 58, 21, 0, 7, 33, 11], [60, 2]]  # ragged; 0 is also the padding
NO_EOS = [-1]
Z_MILLION = 4.7534  # the normal quantile that chance exceeds once in a million times


# --------------------------------------------------------------------------------------------- the slow referee


class SlowNetwork:
    """A policy's parameters in float64 and its forward pass by nested loops. `w` may require gradients."""

    def __init__(self, policy: Policy):
        self.w = {name: p.detach().double() for name, p in policy.named_parameters()}
        if policy.model.config.tie_word_embeddings:
            self.w["model.lm_head.weight"] = self.w["model.model.embed_tokens.weight"]
        self.config, self.exits, self.adapters = policy.model.config, policy.exits, True
        self.scale = policy.alpha / policy.rank

    def linear(self, name, x):
        y = torch.stack([(row * x).sum() for row in self.w[f"{name}.weight"]])
        if f"{name}.bias" in self.w:
            y = y + self.w[f"{name}.bias"]
        if self.adapters and f"{name}.lora_A" in self.w:
            y = y + self.scale * (self.w[f"{name}.lora_B"] @ (self.w[f"{name}.lora_A"] @ x))
        return y

    def norm(self, x, name=None):
        y = x / ((x * x).sum() / len(x) + self.config.rms_norm_eps).sqrt()
        return y * self.w[f"{name}.weight"] if name else y

    def heads_of(self, x, count, position, norm):
        """A projection (count * C,) -> count vectors (C,), normed if asked (Qwen3) and rotated if position is given."""
        C, out = self.config.head_dim, []
        for i in range(count):
            head = x[i * C : (i + 1) * C]
            if norm and self.config.model_type == "qwen3":
                head = self.norm(head, norm)
            if position is not None:
                turned = []
                for c in range(C):
                    angle = position * self.config.rope_theta ** (-2 * (c % (C // 2)) / C)
                    other = -head[c + C // 2] if c < C // 2 else head[c - C // 2]
                    turned.append(head[c] * math.cos(angle) + other * math.sin(angle))
                head = torch.stack(turned)
            out.append(head)
        return out

    def run(self, ids, depths):
        """ids and depths, one a position -> streams[t][l] after l layers (frozen ones repeated), keys and values
        [layer][t][kv head], and exit logits z[t][e] read from streams[t]."""
        c = self.config
        streams, z = [], []
        keys, values = ([[] for _ in range(c.num_hidden_layers)] for _ in range(2))
        for t, (token, depth) in enumerate(zip(ids, depths, strict=True)):
            h = self.w["model.model.embed_tokens.weight"][token]
            stream = [h]
            for layer in range(c.num_hidden_layers):
                at = f"model.model.layers.{layer}."
                x = self.norm(h, at + "input_layernorm")
                k, v = (self.linear(f"{at}self_attn.{which}_proj", x) for which in "kv")
                keys[layer].append(self.heads_of(k, c.num_key_value_heads, t, at + "self_attn.k_norm"))
                values[layer].append(self.heads_of(v, c.num_key_value_heads, None, None))
                if layer < depth:
                    q = self.linear(at + "self_attn.q_proj", x)
                    mixed = []
                    for i, query in enumerate(self.heads_of(q, c.num_attention_heads, t, at + "self_attn.q_norm")):
                        group = i * c.num_key_value_heads // c.num_attention_heads
                        logits = [(query * keys[layer][s][group]).sum() / c.head_dim**0.5 for s in range(t + 1)]
                        weights = torch.stack(logits).softmax(0)
                        mixed.append(sum(weights[s] * values[layer][s][group] for s in range(t + 1)))
                    h = h + self.linear(at + "self_attn.o_proj", torch.cat(mixed))
                    x = self.norm(h, at + "post_attention_layernorm")
                    gate, up = self.linear(at + "mlp.gate_proj", x), self.linear(at + "mlp.up_proj", x)
                    h = h + self.linear(at + "mlp.down_proj", gate / (1 + (-gate).exp()) * up)
                stream.append(h)
            streams.append(stream)
            z.append([(self.norm(stream[e]) * self.w["heads.weight"][i]).sum() + self.w["heads.bias"][i]
                      for i, e in enumerate(self.exits)])
        return streams, keys, values, z

    def p_tokens(self, h, temperature=1.0):
        """The read-out of a stream (D,): probabilities of every token (V,)."""
        logits = self.linear("model.lm_head", self.norm(h, "model.model.norm")) / temperature
        return (logits - logits.max()).exp() / (logits - logits.max()).exp().sum()

    def p_depths(self, z, delta=0.0):
        """Exit logits of a position, E of them -> its E+1 probabilities, the full stack last."""
        left, out = 1.0, []
        for logit in z:
            p = 1 / (1 + (-(logit + delta)).exp())
            out.append(left * p)
            left = left * (1 - p)
        return [*out, left]

    def p_joint(self, ids, depths, temperature=1.0, delta=0.0):
        """The table (E+1, V) of (depth, token) at the position after a prefix whose own depths are `depths`."""
        rows = []
        for i, depth in enumerate((*self.exits, self.config.num_hidden_layers)):
            streams, _, _, z = self.run(ids, [*depths, depth])
            rows.append(self.p_depths(z[-1], delta)[i] * self.p_tokens(streams[-1][-1], temperature))
        return torch.stack(rows)

    def logp(self, prompt, response, depths, temperature=1.0, delta=0.0):
        """log pi of each depth and of each token of a response."""
        ids, all_depths = [*prompt, *response[:-1]], [self.config.num_hidden_layers] * (len(prompt) - 1) + list(depths)
        streams, _, _, z = self.run(ids, all_depths)
        outcomes = (*self.exits, self.config.num_hidden_layers)
        at = range(len(prompt) - 1, len(ids))
        logp_exit = [self.p_depths(z[t], delta)[outcomes.index(d)].log() for t, d in zip(at, depths, strict=True)]
        logp_token = [self.p_tokens(streams[t][-1], temperature)[x].log() for t, x in zip(at, response, strict=True)]
        return torch.stack(logp_exit), torch.stack(logp_token)


def rows_of(samples, prompts, per_prompt):
    """Samples -> one (prompt, response, depths, logp_exit, logp_token) a row, without the padding."""
    prompts = [prompt for prompt in prompts for _ in range(per_prompt)]
    return [(prompt, *(getattr(samples, field)[r, : samples.lengths[r]].tolist()
                       for field in ("tokens", "depths", "logp_exit", "logp_token")))
            for r, prompt in enumerate(prompts)]


def set_heads(policy: Policy, bias: float) -> Policy:
    """Heads that ignore the stream: a bias far below 0 closes every exit, one far above opens them all."""
    with torch.no_grad():
        policy.heads.weight.zero_()
        policy.heads.bias.fill_(bias)
    return policy


def chi_square_limit(cells: int) -> float:
    """What a chi-square of cells - 1 degrees of freedom exceeds once in a million seeds (Wilson and Hilferty 1931)."""
    df = cells - 1
    return df * (1 - 2 / (9 * df) + Z_MILLION * (2 / (9 * df)) ** 0.5) ** 3


def assert_frequencies(counts, p):
    """Pearson's test of counts against probabilities, rare cells pooled; false alarm: one seed in a million."""
    counts, p = np.asarray(counts, float).ravel(), np.asarray(p, float).ravel()
    n = counts.sum()
    assert abs(p.sum() - 1) < 1e-9
    order = np.argsort(p)
    pooled = int((p[order].cumsum() * n < 8).sum()) + 1  # the rarest cells, until together they are not rare
    counts, p = (np.append(x[order][pooled:], x[order][:pooled].sum()) for x in (counts, p))
    assert len(p) > 2
    assert (((counts - n * p) ** 2) / (n * p)).sum() < chi_square_limit(len(p))


# ------------------------------------------------------------------------------------------ exits and freezing


@pytest.mark.parametrize("n_layers, every, wanted", [
    (36, None, [5, 10, 15, 20, 25, 30, 35]), (28, None, [5, 10, 15, 20, 25]), (8, None, [2, 4, 6]),
    (19, None, list(range(2, 19, 2))), (20, None, [5, 10, 15]), (28, 7, [7, 14, 21]), (3, 1, [1, 2]), (6, 5, [5])])
def test_exit_depths_are_every_fifth_layer_below_the_last(n_layers, every, wanted):
    """Other depths than the paper's would make no figure comparable."""
    assert list(exit_depths(n_layers, every)) == wanted


@pytest.mark.parametrize("n_layers, every", [(28, 28), (28, 40), (28, -1), (28, 0), (1, None)])
def test_a_stride_out_of_range_names_its_flag(n_layers, every):
    """A model without exits would train nothing, without a word."""
    with pytest.raises(UserError, match="--exit-every"):
        exit_depths(n_layers, every)


@pytest.mark.parametrize("bad", [(), (4, 2), (2, 2), (0, 2), (2, 6), (2, 7), (-1,)])
def test_bad_exits_are_refused(bad):
    """The full stack is no exit, and stick-breaking needs ascending depths."""
    with pytest.raises(UserError, match="exits"):
        Policy(toy_model(), bad, 2)


def test_fresh_heads_exit_with_sigmoid_minus_4_on_the_normalised_stream():
    """A head on the raw stream would see its norm grow with depth; a head that starts open ruins the first step."""
    policy = Policy(toy_model(), EXITS, 2)
    with torch.no_grad():
        z = policy(torch.tensor(PROMPTS[2])[None]).exit_logits
        assert torch.equal(z, torch.full((1, 7, 2), -4.0))
        heads = ExitHeads(3, 20, 1e-6, "cpu")
        heads.weight.normal_()
        h = torch.randn(20)
        assert abs(float(heads(h, 1)) - float(heads(1000 * h, 1))) < 1e-4
        wanted = sum(float(h[d] * heads.weight[1, d]) for d in range(20)) / (float(h.square().sum()) / 20) ** 0.5 - 4
        assert abs(float(heads(h, 1)) - wanted) < 1e-4


@pytest.mark.parametrize("kind, tied", KINDS)
def test_closed_heads_and_switched_off_adapters_are_the_base_model_bit_for_bit(kind, tied):
    """Teacher and reference policy are the student's own weights: any difference would be distilled and penalised."""
    changes = dict(model_type=kind, tie_word_embeddings=tied)
    ids = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    base = toy_model(**changes)
    policy = toy_policy(**changes)
    with torch.no_grad():
        stream, logits = base.stream(ids), base(ids)
        assert not torch.allclose(policy.model(ids), logits, atol=0.1)  # the adapters do change it
        with adapters_off(policy):
            assert torch.equal(policy(ids).h, stream)
            assert torch.equal(policy.model(ids), logits)
            for closed in (-1e9, -math.inf):
                set_heads(policy, closed)
                drawn = policy(ids, u=torch.zeros(2, 7, 2))
                assert torch.equal(drawn.h, stream)
                assert (drawn.depths == L).all()


def test_closed_heads_and_switched_off_adapters_sample_what_the_base_model_would():
    """The teacher's responses are sampled by the same loop."""
    base, policy, response = toy_model(), set_heads(toy_policy(), -1e9), []
    with torch.no_grad():
        for _ in range(9):
            response.append(int(base(torch.tensor([PROMPTS[0] + response]))[0, -1].argmax()))
    with adapters_off(policy):
        samples = generate(policy, PROMPTS[:1], max_new_tokens=9, eos_ids=NO_EOS, temperature=0)
    assert samples.tokens[0].tolist() == response
    assert samples.depths[0].tolist() == [L] * 9
    assert samples.logp_exit.abs().max() < 1e-6


@pytest.mark.parametrize("kind, tied", KINDS)
def test_parallel_pass_equals_the_slow_network_at_mixed_depths(kind, tied):
    """The one place where a stream freezes: streams, lenses and exit logits at every position."""
    policy = toy_policy(model_type=kind, tie_word_embeddings=tied)
    ids, depths = PROMPTS[2], [6, 6, 2, 4, 6, 2, 4]
    streams, _, _, z = SlowNetwork(policy).run(ids, depths)
    with torch.no_grad():
        out = policy(torch.tensor([ids]), torch.tensor([depths]))
    assert out.depths.tolist() == [depths]
    for t in range(len(ids)):
        torch.testing.assert_close(out.h[0, t].double(), streams[t][L], atol=1e-5, rtol=1e-5)
        for e, depth in enumerate(EXITS):
            torch.testing.assert_close(out.streams[e][0, t].double(), streams[t][depth], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out.exit_logits[0, t, e].double(), z[t][e], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_later_layers_own_keys_and_values_of_the_frozen_stream(kind, monkeypatch):
    """Later tokens attend to a frozen one at every depth: copied, stale or adapter-free keys would mislead them.

    Once in the parallel pass, once in the cache after sampling; both against the slow network's projections. The cache
    has them as far as some token of the row has run the layer, and the frozen stream for the rest.
    """
    policy, caches, seen = toy_policy(model_type=kind), [], []

    class Recorded(exits.Cache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(exits, "Cache", Recorded)
    samples = generate(policy, PROMPTS, max_new_tokens=8, eos_ids=NO_EOS, seed=(5,))
    assert set(samples.depths.flatten().tolist()) == {2, 4, 6}
    cache, lagging = caches[0], 0
    spread = Sequences.spread
    monkeypatch.setattr(Sequences, "spread", lambda *args: seen.append(spread(*args)) or seen[-1])
    for r, (prompt, tokens, depths, *_) in enumerate(rows_of(samples, PROMPTS, 1)):
        ids, all_depths = [*prompt, *tokens[:-1]], [L] * (len(prompt) - 1) + depths
        streams, keys, values, _ = SlowNetwork(policy).run(ids, all_depths)
        seen.clear()
        with torch.no_grad():
            policy(torch.tensor([ids]), torch.tensor([all_depths]))
        for layer in range(L):
            filled = max([t + 1 for t, depth in enumerate(all_depths) if depth > layer], default=0)
            assert cache.filled[layer // 2, r] == filled
            lagging += filled < len(ids)
            for t in range(len(ids)):
                for i, cached, slow in ((1, cache.k, keys), (2, cache.v, values)):
                    wanted = torch.stack(slow[layer][t])
                    torch.testing.assert_close(seen[3 * layer + i][0, t].double(), wanted, atol=1e-4, rtol=1e-4)
                    if t < filled:
                        torch.testing.assert_close(cached[layer, r, t].double(), wanted, atol=1e-4, rtol=1e-4)
                if t >= filled:
                    torch.testing.assert_close(cache.frozen[r, t].double(), streams[t][L], atol=1e-4, rtol=1e-4)
    assert lagging


def test_rows_that_enter_each_mlp_while_sampling_are_the_rows_still_running():
    """The saving is real only if frozen and finished rows cost nothing. Each row is recognised by its input."""
    policy, step, seen = toy_policy(), [-1], {}

    def count_steps(*_):
        step[0] += 1

    handles = [policy.register_forward_pre_hook(count_steps)]
    for layer, block in enumerate(policy.model.model.layers):
        for name, part in (("mlp", block.mlp), ("q_proj", block.self_attn.q_proj), ("o_proj", block.self_attn.o_proj)):
            def record(_, args, key=(name, layer)):
                seen.setdefault((*key, step[0]), []).append(args[0])
            handles.append(part.register_forward_pre_hook(record))
    samples = generate(policy, PROMPTS, samples=3, max_new_tokens=15, eos_ids=range(0, 61, 9), seed=(1,))
    rows = rows_of(samples, PROMPTS, 3)
    assert len(set(samples.lengths.tolist())) > 3
    assert set(depth for row in rows for depth in row[2]) == {2, 4, 6}

    sampled, seen = seen, {}
    step[0] = -1
    batch = collate(*zip(*(row[:3] for row in rows), strict=True), n_layers=L)
    with torch.no_grad():
        policy(batch.ids, batch.depths, source=batch.source)
    for name in ("mlp", "q_proj", "o_proj"):
        for layer in range(L):
            # The parallel pass packs what runs, too: each prompt once, then every token that goes beyond this layer.
            (parallel,), packed = seen[name, layer, 0], (batch.depths > layer).nonzero().tolist()
            assert len(parallel) == len(packed)
            for t in range(int(samples.lengths.max())):
                running = [[r, len(prompt) - 1 + t] for r, (prompt, _, depths, *_) in enumerate(rows)
                           if t < len(depths) and depths[t] > layer]
                inputs = torch.cat(sampled.get((name, layer, t), [torch.zeros(0, 1)]))
                assert len(inputs) == len(running)
                for x, where in zip(inputs, running, strict=True):
                    torch.testing.assert_close(x, parallel[packed.index(where)], atol=1e-4, rtol=1e-4)
    for handle in handles:
        handle.remove()


# ----------------------------------------------------------------------------------- the equations, by nested loops


def test_stick_breaking_equals_the_product_of_survivals():
    """Eq. (S): a wrong index here pays for the wrong exit everywhere."""
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double() * 4
    outcomes = stick_breaking(torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z))
    for n in range(50):
        left = 1.0
        for e in range(4):
            p = 1 / (1 + math.exp(-z[n, e]))
            assert abs(math.exp(outcomes[n, e]) - left * p) < 1e-12
            left *= 1 - p
        assert abs(math.exp(outcomes[n, 4]) - left) < 1e-12


def test_stick_breaking_stays_finite_where_probabilities_round_to_nothing():
    """As a product of float32 probabilities, an exit at logit -200 would have log-probability -inf."""
    z = torch.tensor([[-200.0, 200.0], [200.0, -200.0]], requires_grad=True)
    outcomes = stick_breaking(torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z))
    torch.testing.assert_close(outcomes, torch.tensor([[-200.0, 0, -200], [0, -400, -200]]))
    outcomes.sum().backward()
    assert z.grad.isfinite().all()


def test_joint_probabilities_sum_to_one():
    """Eq. (2) over the whole (depth, token) table, each depth prescribed in turn, after a prefix of mixed depths."""
    policy = toy_policy(vocab_size=13)
    ids, before = torch.tensor([[4, 12, 0, 7]]), [6, 2, 4]
    for temperature, delta in ((1.0, 0.0), (0.6, 1.5)):
        total, slow = 0.0, SlowNetwork(policy).p_joint(ids[0].tolist(), before, temperature, delta)
        for i, depth in enumerate((2, 4, 6)):
            with torch.no_grad():
                out = policy(ids, torch.tensor([[*before, depth]]))
                h, z = out.h[0, -1].expand(13, -1), out.exit_logits[0, -1].expand(13, -1)
                logp_exit, logp_token, _ = joint_logp(policy, h, z, torch.full((13,), depth), torch.arange(13),
                                                      temperature=temperature, delta=delta)
            p = (logp_exit + logp_token).double().exp()
            torch.testing.assert_close(p, slow[i], atol=1e-6, rtol=1e-4)
            total += float(p.sum())
        assert abs(total - 1) < 1e-6


def test_token_kl_equals_the_sum_over_the_vocabulary():
    """KL of (1) and (5): the direction and the exactness decide what the student learns and what RLOO pays."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 13, generator=generator).double().log_softmax(-1) for _ in range(2))
    for n in range(9):
        wanted = 0.0
        for x in range(13):
            wanted += math.exp(a[n, x]) * (float(a[n, x]) - float(b[n, x]))
        assert abs(float(kl(a, b)[n]) - wanted) < 1e-12
    assert (kl(a, a.float().double()) >= 0).all()


@pytest.mark.parametrize("kind, tied", KINDS)
def test_score_and_its_gradient_equal_the_slow_networks(kind, tied):
    """Both training stages descend this gradient: through streams frozen at mixed depths, their keys and values, the
    heads, the read-out, and the exact KL to the base model, which reads the same tokens at full depth on its own."""
    policy = toy_policy(model_type=kind, tie_word_embeddings=tied, vocab_size=13)
    prompt, response, depths = [4, 12, 9], [0, 7, 7, 1], [4, 2, 6, 4]
    batch = collate([prompt], [response], [depths], n_layers=L)
    logp_exit, logp_token, token_kl, _ = score(policy, batch, teacher_pass(policy, batch)[0])
    weights = torch.tensor([1.0, -0.5, 2.0, 0.7])
    (weights * (logp_exit + 0.5 * logp_token + 0.3 * token_kl)).sum().backward()

    slow = SlowNetwork(policy)
    for name in policy.trained():
        slow.w[name].requires_grad_(True)
    slow_exit, slow_token = slow.logp(prompt, response, depths)
    ids = [*prompt, *response[:-1]]
    student = slow.run(ids, [L, L, *depths])[0]
    slow.adapters = False
    teacher = slow.run(ids, [L] * len(ids))[0]
    slow.adapters = True
    slow_kl = []
    for t in range(2, len(ids)):
        p, q = slow.p_tokens(student[t][-1]), slow.p_tokens(teacher[t][-1])
        slow_kl.append(sum(p[x] * (p[x].log() - q[x].log()) for x in range(13)))
    slow_kl = torch.stack(slow_kl)
    (weights.double() * (slow_exit + 0.5 * slow_token + 0.3 * slow_kl)).sum().backward()

    for ours, wanted in ((logp_exit, slow_exit), (logp_token, slow_token), (token_kl, slow_kl)):
        torch.testing.assert_close(ours.double(), wanted, atol=1e-5, rtol=1e-5)
    for name, p in policy.trained().items():
        assert slow.w[name].grad.abs().max() > 0
        torch.testing.assert_close(p.grad.double(), slow.w[name].grad, atol=1e-4, rtol=1e-3)


def test_joint_logp_gradient_equals_finite_differences():
    """A second referee for the gradient, which needs no autograd: central differences of the loops' own values."""
    policy = toy_policy(vocab_size=13)
    slow = SlowNetwork(policy)
    prompt, response, depths = [4, 12], [0, 7, 5], [4, 2, 6]
    batch = collate([prompt], [response], [depths], n_layers=L)
    logp_exit, logp_token, *_ = score(policy, batch)
    (logp_exit + logp_token).sum().backward()
    for name, p in list(policy.trained().items())[::9] + [("heads.weight", policy.heads.weight)]:
        index = tuple(int(i) for i in np.unravel_index(int(p.grad.abs().argmax()), p.shape))
        ends = []
        for step in (1e-4, -1e-4):
            slow.w[name][index] += step
            ends.append(float(sum(part.sum() for part in slow.logp(prompt, response, depths))))
            slow.w[name][index] -= step
        wanted = (ends[0] - ends[1]) / 2e-4
        assert abs(float(p.grad[index]) - wanted) < 1e-3 * abs(wanted) + 1e-5


def test_chunked_equals_unchunked_in_values_draws_and_gradients(monkeypatch):
    """Vocabulary-sized work goes a few positions at a time, or long batches would not fit; no seam may show."""
    policy, results, sizes = toy_policy(), [], []
    batch = collate(PROMPTS, [[1, 2, 3, 4, 5]] * 4, [[2, 4, 6, 4, 2]] * 4, n_layers=L)
    teacher_h, _ = teacher_pass(policy, batch)
    plain = policy.model.unembed
    monkeypatch.setattr(policy.model, "unembed", lambda h: sizes.append(len(h)) or plain(h))
    for chunk in (2**25, 3 * 61 + 1, 1):
        monkeypatch.setattr(exits, "CHUNK_CPU", chunk)
        policy.zero_grad()
        sizes.clear()
        parts = score(policy, batch, teacher_h)[:3]
        sum(part.sum() for part in parts).backward()
        results.append((max(sizes), [part.detach() for part in parts], [p.grad for p in policy.trained().values()],
                        generate(policy, PROMPTS, samples=5, max_new_tokens=6, eos_ids=[7, 8], seed=(1,))))
    assert [result[0] for result in results] == [20, 3, 1]
    for _, parts, gradients, samples in results[1:]:
        for ours, wanted in zip(parts + gradients, results[0][1] + results[0][2], strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(samples.tokens, results[0][3].tokens)
        assert torch.equal(samples.depths, results[0][3].depths)


def test_chunks_keep_nothing_of_vocabulary_size_for_the_backward_pass(monkeypatch):
    """Peak memory would grow with T x V again: only streams may wait for the backward pass, not tables."""
    policy, saved = toy_policy(vocab_size=997), []
    batch = collate(PROMPTS, [[1, 2, 3, 4, 5]] * 4, [[2, 4, 6, 4, 2]] * 4, n_layers=L)
    teacher_h, _ = teacher_pass(policy, batch)
    monkeypatch.setattr(exits, "CHUNK_CPU", 4 * 997)

    def pack(t):
        t = t.detach()  # an output that is saved would keep itself alive
        saved.append(weakref.ref(t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = score(policy, batch, teacher_h)
    waiting = [t for t in (ref() for ref in saved) if t is not None]
    tables = [t for t in waiting if t.ndim and t.shape[-1] == 997 and t.shape[0] != 20]  # (D, V) is the head itself
    assert kept and waiting and not tables
    assert len(waiting) < len(saved)  # tables there were


def test_teacher_pass_gives_the_base_models_streams_at_every_exit():
    """Targets (3), (4) are lenses on the base model; read from the student they would chase themselves."""
    policy, base = toy_policy(), toy_model()
    batch = collate(PROMPTS, [[1, 2, 3]] * 4, [[2, 4, 2]] * 4, n_layers=L)  # the recorded depths must not matter
    teacher_h, lenses = teacher_pass(policy, batch)
    assert all(adapter.on for adapter in policy.adapters) and not teacher_h.requires_grad
    n = 0
    for prompt in PROMPTS:
        ids, wanted = torch.tensor([[*prompt, 1, 2]]), {}
        with torch.no_grad():
            wanted[L] = base.stream(ids, EXITS, lambda depth, h, wanted=wanted: wanted.update({depth: h}))
        for t in range(len(prompt) - 1, len(prompt) + 2):
            for ours, depth in zip((*lenses, teacher_h), (2, 4, 6), strict=True):
                torch.testing.assert_close(ours[n], wanted[depth][0, t], atol=1e-5, rtol=1e-5)
            n += 1
    assert n == len(teacher_h) == 12


def test_collate_lays_out_predicting_positions_by_length_alone():
    """The padding id may be an eos that the policy chose: a mask from ids would drop the very action that ended it."""
    prompts, responses, depths = [[5, 0], [0], [1, 2, 3]], [[0, 9, 0], [0], [7, 0]], [[2, 6, 4], [2], [6, 2]]
    batch = collate(prompts, responses, depths, n_layers=L)
    ids, all_depths, tokens, positions, picked = [], [], [], [], []
    for b, (prompt, response, depth) in enumerate(zip(prompts, responses, depths, strict=True)):
        row = [*prompt, *response][:-1]
        ids.append(row + [0] * (4 - len(row)))
        all_depths.append(([L] * (len(prompt) - 1) + depth + [0] * 4)[:4])
        for i, token in enumerate(response):
            positions.append((b, len(prompt) - 1 + i))
            tokens.append(token)
            picked.append(depth[i])
    assert batch.ids.tolist() == ids and batch.depths.tolist() == all_depths and batch.tokens.tolist() == tokens
    assert list(zip(*(w.tolist() for w in batch.where), strict=True)) == positions
    assert batch.depths[batch.where].tolist() == picked
    assert torch.equal(collate(prompts, responses, n_layers=L).depths, L * (batch.depths > 0))


def test_rows_of_one_prompt_share_its_positions_and_score_as_they_would_alone():
    """The copies' prompts run no layer, and neither values nor gradients may show it. Of the prompts one is a single
    token, which leaves nothing to share, and one stands in a single row; two differ in their first token only."""
    prompts = [[3, 9, 14, 2, 5], [8], [3, 9, 14, 2, 5], [7, 1, 4], [8], [3, 9, 14, 2, 5], [4, 9, 14, 2, 5]]
    responses = [[1, 2, 3], [4], [5], [6, 7], [8, 9, 10], [11, 12], [13]]
    depths = [[2, 6, 4], [2], [6], [4, 2], [4, 6, 6], [6, 6], [6]]

    def gradient(parts):
        policy, values = toy_policy(1), []
        for part in parts:
            batch = collate(*zip(*part, strict=True), n_layers=L)
            *got, exit_logits = score(policy, batch, teacher_pass(policy, batch)[0])
            (got[0] - 0.3 * got[1] + 0.7 * got[2]).sum().backward()
            values.append(torch.cat([torch.stack(got, -1), exit_logits], -1).detach())
        return torch.cat(values), torch.cat([p.grad.flatten() for p in policy.trained().values()]), batch

    rows = list(zip(prompts, responses, depths, strict=True))
    alone, slow, _ = gradient([[row] for row in rows])
    shared, fast, batch = gradient([rows])
    # Past a position's own depth exit logits mean nothing, but they too are read from one frozen stream.
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    assert (batch.depths > 0).sum(1).tolist() == [7, 1, 1, 4, 3, 2, 5]


# ----------------------------------------------------------------------------------------------- random draws


def splitmix(*address) -> float:
    """uniforms() of one address in Python integers."""
    key, whole = 0, 2**64 - 1
    for part in address:
        x = ((key ^ (part & whole)) + 0x9E3779B97F4A7C15) & whole
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
        key = x ^ (x >> 31)
    return (key >> 11) / 2**53


def test_uniforms_are_a_function_of_their_address_alone():
    """A row's sample would change with the batch around it, and no run could be repeated."""
    whole = uniforms((7, 11), np.arange(40)[:, None], np.arange(30), 4)
    assert whole.shape == (40, 30, 4) and whole.dtype == torch.float64
    for row, position, i in ((0, 0, 0), (39, 29, 3), (17, 3, 1)):
        assert float(whole[row, position, i]) == splitmix(7, 11, row, position, i)
    assert torch.equal(uniforms((7, 11), [17, 3], [3, 5], 2), torch.stack([whole[17, 3, :2], whole[3, 5, :2]]))
    assert torch.equal(uniforms((7, 11), torch.tensor([17]), torch.tensor([3]), 4), whole[17, 3][None])


def test_uniforms_differ_in_every_part_of_their_address():
    """A part that is dropped, or parts that can swap, would give two samples the same dice."""
    addresses = [(s, t, r, p) for s in (0, 1, 2) for t in (0, 1, 2) for r in (0, 1, 2, 64) for p in (0, 1, 2, 64)]
    drawn = [u for s, t, r, p in addresses for u in uniforms((s, t), r, p, 3).tolist()]
    assert len(set(drawn)) == len(drawn) == 3 * len(addresses)
    assert float(uniforms((0,), 0, 0, 1)) != float(uniforms((0, 0), 0, 0, 1))


@pytest.mark.parametrize("axis", range(5))
def test_uniforms_are_uniform_and_neighbours_independent_along_each_part(axis):
    """Biased or correlated dice bias every estimate quietly.

    Kolmogorov-Smirnov on 50,000 numbers, limit 2.7 / sqrt(n): false alarm 2 exp(-2 * 2.7^2), one seed in a million;
    and Pearson's test of neighbouring pairs on a 16 x 16 grid.
    """
    n = 50_000
    if axis < 2:
        u = np.array([float(uniforms([(i, 5), (5, i)][axis], 3, 9, 1)) for i in range(n // 10)])
    else:
        u = [uniforms((5, 6), np.arange(n), 9, 1)[:, 0], uniforms((5, 6), 3, np.arange(n), 1)[:, 0],
             uniforms((5, 6), 3, 9, n)][axis - 2].numpy()
    n = len(u)
    assert u.min() >= 0 and u.max() < 1
    ordered = np.sort(u)
    distance = max((np.arange(1, n + 1) / n - ordered).max(), (ordered - np.arange(n) / n).max())
    assert distance * n**0.5 < 2.7
    pairs = np.zeros((16, 16))
    np.add.at(pairs, ((u[0::2] * 16).astype(int), (u[1::2] * 16).astype(int)), 1)
    assert_frequencies(pairs, np.full((16, 16), 1 / 256))


def test_draw_inverts_the_cumulative_distribution():
    """Each token owns an interval as long as its probability; one of probability 0 owns none, not even at u = 0."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(p.log().expand(6, -1), u).tolist() == [1, 1, 3, 3, 4, 4]


# ------------------------------------------------------------------------------------------- sampling and scoring


MODES = [("mixed", None), ("all-exit", 1e9), ("no-exit", -1e9)]


@pytest.mark.parametrize("temperature, delta", [(1.0, 0.0), (0.7, 0.8)])
@pytest.mark.parametrize("mode, bias", MODES)
@pytest.mark.parametrize("kind, tied", KINDS)
def test_cached_sampling_equals_teacher_forced_scoring(kind, tied, mode, bias, temperature, delta):
    """The central invariant: the trainer scores what the sampler did. Broken, every policy gradient is of another
    policy than the one that acted."""
    policy = toy_policy(seed=2, model_type=kind, tie_word_embeddings=tied)
    if bias is not None:
        set_heads(policy, bias)
    samples = generate(policy, PROMPTS, samples=3, max_new_tokens=14, eos_ids=range(0, 61, 9), seed=(4, 2),
                       temperature=temperature, delta=delta, batch_size=6)
    rows = rows_of(samples, PROMPTS, 3)
    used = {depth for row in rows for depth in row[2]}
    assert used == {"mixed": {2, 4, 6}, "all-exit": {2}, "no-exit": {6}}[mode]
    assert len(set(samples.lengths.tolist())) > 3

    def scored(rows):
        batch = collate(*zip(*(row[:3] for row in rows), strict=True), n_layers=L)
        with torch.no_grad():
            out = policy(batch.ids, batch.depths, source=batch.source)
            parts = joint_logp(policy, out.h[batch.where], out.exit_logits[batch.where], batch.depths[batch.where],
                               batch.tokens, temperature=temperature, delta=delta)
            if temperature == 1.0 and delta == 0.0:
                for ours, wanted in zip(score(policy, batch), parts, strict=False):
                    assert ours is wanted is None or torch.equal(ours, wanted)
        return parts[:2]

    sampled = [torch.tensor([x for row in rows for x in row[part]]) for part in (3, 4)]
    singly = [torch.cat(parts) for parts in zip(*(scored([row]) for row in rows), strict=True)]
    for at_sampling, batched, single in zip(sampled, scored(rows), singly, strict=True):
        assert (at_sampling - batched).abs().max() < 1e-4
        assert (at_sampling - single).abs().max() < 1e-4
    shortest = min(rows, key=lambda row: (len(set(row[2])) == 1, len(row[1]) < 3, len(row[0] + row[1])))
    slow = SlowNetwork(policy).logp(*shortest[:3], temperature, delta)
    for at_sampling, wanted in zip(shortest[3:], slow, strict=True):
        assert (torch.tensor(at_sampling) - wanted).abs().max() < 1e-4


def test_a_rows_sample_depends_neither_on_the_batch_size_nor_on_other_prompts():
    """Results would change with the memory of the machine. Rows leave the cache at different steps here."""
    policy, widths = toy_policy(), []
    handle = policy.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    options = dict(samples=4, max_new_tokens=20, eos_ids=range(0, 61, 9), seed=(1, 9))
    whole = generate(policy, PROMPTS, **options)
    assert widths[0] == 16 and widths[-1] < 8 and widths == sorted(widths, reverse=True)  # finished rows left
    handle.remove()
    for batch_size in (1, 8):
        again = generate(policy, PROMPTS, batch_size=batch_size, **options)
        for field in ("tokens", "depths", "lengths", "finished"):
            assert torch.equal(getattr(again, field), getattr(whole, field))
        assert (again.logp_token - whole.logp_token).abs().max() < 1e-4
        assert (again.logp_exit - whole.logp_exit).abs().max() < 1e-4
    first = rows_of(generate(policy, PROMPTS[:1], **options), PROMPTS[:1], 4)
    assert [row[:3] for row in first] == [row[:3] for row in rows_of(whole, PROMPTS, 4)[:4]]
    assert len({(r // 4, *row[1]) for r, row in enumerate(rows_of(whole, PROMPTS, 4))}) > 12  # samples differ
    other_seed = generate(policy, PROMPTS, **{**options, "seed": (1, 8)})
    assert other_seed.tokens[:, :1].tolist() != whole.tokens[:, :1].tolist()


def boundary_distance(policy, prompt, tokens, depths, at, seed, row) -> float:
    """How far the draws of response position `at` lie from where another outcome would begin, given what precedes."""
    E = len(policy.exits)
    ids = torch.tensor([[*prompt, *tokens[:at]]])
    there = torch.tensor([[L] * (len(prompt) - 1) + depths[:at] + [L]])
    position = len(prompt) - 1 + at
    u = [splitmix(*seed, row, position, i) for i in range(E + 1)]
    near = []
    for depth in (*policy.exits, L):  # the exits that could have been taken, and the token's draw at each of them
        there[0, -1] = depth
        with torch.no_grad():
            out = policy(ids, there)
            p_exit = out.exit_logits[0, -1].double().sigmoid()
            cdf = policy.model.unembed(out.h[:, -1]).double().softmax(-1).cumsum(-1)[0]
        near += [abs(u[e] - float(p_exit[e])) for e in range(E)]
        near.append(float((cdf - u[E]).abs().min()))
    return min(near)


WAYS = {"one at a time": dict(batch_size=1), "few rows, refilled": dict(batch_size=5), "all rows": {},
        "row by row": dict(LONG=0), "static shapes": dict(graphs=True),
        "static shapes, refilled": dict(graphs=True, batch_size=7)}


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_every_way_to_decode_draws_the_same_sample_up_to_draws_at_a_boundary(dtype, rounding, monkeypatch):
    """Batching, compaction, late keys and values and fixed shapes are for speed: none may change what is sampled.

    Rounding differs between them, so a draw that lies on a boundary may fall on either side. Every row whose sample
    differs must do so first at such a draw; in float32 there is none here.
    """
    policy, seed, flips = toy_policy(), (2, 7), 0
    policy.model.to(dtype)
    options = dict(samples=3, max_new_tokens=24, eos_ids=[7, 30], seed=seed)
    prompts = PROMPTS * 2
    whole = rows_of(generate(policy, prompts, **options), prompts, 3)
    for changes in WAYS.values():
        monkeypatch.setattr(model, "LONG", changes.get("LONG", 2**15))
        policy.model.graphs = changes.get("graphs", False)
        again = generate(policy, prompts, **options, batch_size=changes.get("batch_size"))
        for r, (ours, wanted) in enumerate(zip(rows_of(again, prompts, 3), whole, strict=True)):
            pairs = (list(zip(*row[1:3], strict=True)) for row in (ours, wanted))
            differ = [t for t, (mine, theirs) in enumerate(zip(*pairs, strict=False)) if mine != theirs]
            same = differ[0] if differ else len(wanted[1])
            if differ:
                flips += 1
                policy.model.graphs = False
                assert boundary_distance(policy, *wanted[:3], differ[0], seed, r) < rounding
                policy.model.graphs = changes.get("graphs", False)
            else:
                assert ours[1:3] == wanted[1:3]
            for mine, theirs in zip(ours[3:], wanted[3:], strict=True):
                assert np.allclose(mine[:same], theirs[:same], atol=rounding if dtype == torch.float32 else 1)
    assert (flips > 0) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_cache_ends_with_the_call_that_made_it(graphs, monkeypatch):
    """It is the largest thing there is: waiting for Python's cycle collector, rollout after rollout would pile up."""
    caches = []

    class Watched(model.Cache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(exits, "Cache", Watched)
    policy = toy_policy()
    policy.model.graphs = graphs
    gc.disable()
    try:
        generate(policy, PROMPTS, samples=2, max_new_tokens=6, eos_ids=[7])
        assert len(caches) == 1 and caches[0]() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_samples_and_scores_on_cuda_are_the_cpus():
    """In float32, with graphs and without."""
    options = dict(samples=3, max_new_tokens=24, eos_ids=[7, 30], seed=(2, 7))
    wanted = rows_of(generate(toy_policy(), PROMPTS, **options), PROMPTS, 3)
    policy = Policy(toy_model().to("cuda"), EXITS, rank=3)
    policy.load_state_dict(toy_policy().state_dict())
    for policy.model.graphs in (False, True):
        samples = generate(policy, PROMPTS, **options)
        for ours, theirs in zip(rows_of(samples, PROMPTS, 3), wanted, strict=True):
            assert ours[1:3] == theirs[1:3]
            assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(ours[3:], theirs[3:], strict=True))
    batch = collate(*zip(*(row[:3] for row in wanted), strict=True), n_layers=L, device="cuda")
    scores = score(policy, batch, teacher_pass(policy, batch)[0])
    scores[2].sum().backward()
    for i in (0, 1):
        assert np.allclose(scores[i].tolist(), [x for row in wanted for x in row[3 + i]], atol=1e-4)


def test_layers_that_no_row_runs_do_no_work_at_all_and_late_keys_come_in_one_product():
    """Wall clock follows depth only if frozen tokens ask nothing of later layers until a later token needs them."""
    policy, seen = toy_policy(), []
    for layer, block in enumerate(policy.model.model.layers):
        for part in (block.self_attn.q_proj, block.self_attn.k_proj):
            part.register_forward_pre_hook(
                lambda part, args, layer=layer, name=part.weight.shape[0]: seen.append((layer, name, len(args[0]))))
    queries, keys = (policy.model.model.layers[0].self_attn.q_proj.weight.shape[0],
                     policy.model.model.layers[0].self_attn.k_proj.weight.shape[0])
    assert queries != keys
    # Row 0 stays at depth 2 for five tokens, goes to 6, then to 4; row 1 never leaves depth 2.
    depths = torch.tensor([[2, 2, 2, 2, 2, 6, 4, 4], [2] * 8])
    generate(policy, [[7], [8]], max_new_tokens=8, eos_ids=NO_EOS, depths=depths)
    got = [[(name, n) for at, name, n in seen if at == layer] for layer in range(L)]
    once = [(queries, 2), (keys, 2)]
    assert got[0] == got[1] == once * 8
    assert got[2] == got[3] == [(queries, 1), (keys, 6), (queries, 1), (keys, 1), (queries, 1), (keys, 1)]
    assert got[4] == got[5] == [(queries, 1), (keys, 6)]
    # The parallel pass: padding gives no keys either.
    seen.clear()
    batch = collate([[7], [8, 9]], [[1, 2, 3, 4, 5], [6]], [[2, 4, 6, 2, 2], [4]], n_layers=L)
    policy(batch.ids, batch.depths, source=batch.source)
    assert seen == [(layer, name, n) for layer, running in enumerate((7, 7, 4, 4, 2, 2))
                    for name, n in ((queries, running), (keys, 7))]


def test_rows_that_end_are_replaced_and_a_prompts_samples_share_its_pass():
    """Else the longest response of every batch holds up all others, and a prompt is read once for each sample."""
    policy, busy, prefills = toy_policy(), [], []
    policy.register_forward_pre_hook(lambda _, args: busy.append(int((args[1] > 0).sum())))
    first = policy.model.model.layers[0].self_attn.o_proj
    first.register_forward_pre_hook(lambda _, args: prefills.append(len(args[0])))
    prompts = [[5, 17, 42]] * 12
    depths = torch.full((24, 9), L)
    options = dict(samples=2, max_new_tokens=9, eos_ids=range(0, 61, 5), depths=depths)
    samples = generate(policy, prompts, batch_size=6, **options)
    lengths = samples.lengths.tolist()
    assert len(set(lengths)) > 4
    assert max(busy) == 6 and sum(busy) == sum(lengths)
    batch_after_batch = sum(max(lengths[i : i + 6]) for i in range(0, 24, 6))
    assert len(busy) < batch_after_batch
    # Of every prompt the two leading tokens, once for both samples; every other call is a step's running rows.
    assert sum(prefills) - sum(busy) == 12 * 2


@pytest.mark.parametrize("free, wanted", [(0, 1), (10**6, None), (10**15, 256)])
def test_rows_follow_free_memory(free, wanted, monkeypatch):
    """A fixed number either runs out of memory or leaves most of it idle."""
    policy = toy_policy()
    slot = 2 * L * policy.model.config.num_key_value_heads * policy.model.config.head_dim + 20
    assert exits.cache_bytes(policy, 30) == 30 * slot * 4
    cache = exits.Cache(policy.model.config, 5, 30, 3, policy.model.lm_head.weight)
    held = sum(t.numel() * t.element_size() for t in (cache.k, cache.v, cache.frozen))
    assert held == 5 * exits.cache_bytes(policy, 30)
    monkeypatch.setattr(exits.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_AVPHYS_PAGES": free}[name])
    assert exits.fitting_rows(policy, 30) == (wanted or free // 2 // exits.cache_bytes(policy, 30))


def test_exits_drawn_in_the_parallel_pass_equal_those_drawn_step_by_step():
    """Stage 1 reports the exits drawn in a parallel pass as the learned distribution."""
    policy = toy_policy(seed=2)
    for delta in (0.0, -1.0):
        samples = generate(policy, PROMPTS, samples=2, max_new_tokens=12, eos_ids=[7, 8, 9], seed=(5, 6), delta=delta)
        rows = rows_of(samples, PROMPTS, 2)
        batch = collate(*zip(*(row[:3] for row in rows), strict=True), n_layers=L)
        u = torch.ones(*batch.ids.shape, 2, dtype=torch.float64)  # a position that may not exit
        for row, position in zip(*(w.tolist() for w in batch.where), strict=True):
            u[row, position] = torch.tensor([splitmix(5, 6, row, position, e) for e in (0, 1)])
        with torch.no_grad():
            drawn = policy(batch.ids, L * (batch.depths > 0), u, delta, source=batch.source)
            assert torch.equal(drawn.depths, batch.depths)
        assert len(batch.depths[batch.where].unique()) == 3


@pytest.mark.parametrize("temperature, delta", [(1.0, 0.0), (0.7, 1.0), (1.6, -0.7)])
def test_sampler_frequencies_equal_the_joint(temperature, delta):
    """A sampler that truncates, or that uses other odds than it reports, makes every reward estimate one of another
    policy. 3 depths x 7 tokens, 4,000 samples, against the slow network's table; false alarm: one seed in a million."""
    policy, prompt = toy_policy(vocab_size=7), [3, 6, 0, 2]
    samples = generate(policy, [prompt], samples=4000, max_new_tokens=1, eos_ids=NO_EOS, seed=(1,),
                       temperature=temperature, delta=delta)
    counts = np.zeros((3, 7))
    np.add.at(counts, (samples.depths[:, 0].numpy() // 2 - 1, samples.tokens[:, 0].numpy()), 1)
    with torch.no_grad():
        assert_frequencies(counts, SlowNetwork(policy).p_joint(prompt, [L] * 3, temperature, delta))


def test_sampler_frequencies_equal_the_joint_over_two_steps():
    """The second step reads what the first one wrote: its token, its depth, its frozen keys and values; and token 2
    ends a response. 2 depths x 3 tokens, twice, 6,000 samples; false alarm: one seed in a million."""
    policy, prompt = toy_policy(vocab_size=3, exits=(3,)), [1, 2, 0]
    samples = generate(policy, [prompt], samples=6000, max_new_tokens=2, eos_ids=[2], seed=(8,))
    slow, p, counts = SlowNetwork(policy), {}, {}
    with torch.no_grad():
        first = slow.p_joint(prompt, [L] * 2)
        for i, depth in enumerate((3, 6)):
            p[(depth, 2),] = float(first[i, 2])
            for token in (0, 1):
                second = slow.p_joint([*prompt, token], [L, L, depth])
                for j, next_depth in enumerate((3, 6)):
                    for next_token in range(3):
                        path = (depth, token), (next_depth, next_token)
                        p[path] = float(first[i, token] * second[j, next_token])
    for _, tokens, depths, *_ in rows_of(samples, [prompt], 6000):
        path = tuple(zip(depths, tokens, strict=True))
        counts[path] = counts.get(path, 0) + 1
    assert counts.keys() <= p.keys()
    assert_frequencies([counts.get(path, 0) for path in p], list(p.values()))


def test_temperature_zero_takes_the_likeliest_token_and_still_draws_exits():
    """Greedy evaluation of a policy whose exits were no longer drawn would measure another depth."""
    policy, prompt = toy_policy(5, vocab_size=7), [3, 6, 0, 2]
    samples = generate(policy, [prompt], samples=2000, max_new_tokens=1, eos_ids=NO_EOS, seed=(1,), temperature=0)
    slow = SlowNetwork(policy)
    with torch.no_grad():
        joint = slow.p_joint(prompt, [L] * 3)
    likeliest = {depth: int(joint[i].argmax()) for i, depth in enumerate((2, 4, 6))}
    assert len(set(likeliest.values())) > 1
    assert [likeliest[depth] for depth in samples.depths[:, 0].tolist()] == samples.tokens[:, 0].tolist()
    assert_frequencies([(samples.depths == depth).sum() for depth in (2, 4, 6)], joint.sum(-1))
    for i, depth in enumerate((2, 4, 6)):  # scored at temperature 1
        r = int((samples.depths[:, 0] == depth).nonzero()[0])
        p = math.exp(samples.logp_exit[r, 0] + samples.logp_token[r, 0])
        assert abs(p - float(joint[i, likeliest[depth]])) < 1e-5


def test_prescribed_depths_are_run_and_scored():
    """The fixed-depth baselines, and a replay of recorded depths."""
    policy, options = toy_policy(), dict(samples=2, max_new_tokens=5, eos_ids=[0, 9, 18], seed=(1,))
    table = torch.tensor([2, 4, 6, 6, 2, 4, 4] * 6)[:40].view(8, 5)
    for depths in (2, 4, 6, table):
        samples = generate(policy, PROMPTS, depths=depths, **options)
        for r, (prompt, tokens, used, logp_exit, logp_token) in enumerate(rows_of(samples, PROMPTS, 2)):
            assert used == ([depths] * 5 if isinstance(depths, int) else table[r].tolist())[: len(tokens)]
            if depths is table and r in (0, 5, 6):
                wanted = SlowNetwork(policy).logp(prompt, tokens, used)
                torch.testing.assert_close(torch.tensor([logp_exit, logp_token]).double(), torch.stack(wanted),
                                           atol=1e-4, rtol=0)
    drawn = generate(policy, PROMPTS, **options)
    wide = torch.full((8, 5), L)
    wide[:, : drawn.depths.shape[1]] = drawn.depths
    replayed = generate(policy, PROMPTS, depths=wide, **options)  # the tokens' dice don't depend on the exits'
    assert torch.equal(replayed.tokens, drawn.tokens) and torch.equal(replayed.depths, drawn.depths)


def test_any_eos_ends_a_response_and_is_counted():
    """The eos is an action: it has a depth, a log-probability, and a place in the length."""
    policy, advanced = toy_policy(), []
    bar = type("Bar", (), {"update": lambda self, n: advanced.append(n)})()
    free = generate(policy, PROMPTS, samples=4, max_new_tokens=12, eos_ids=NO_EOS, seed=(6,))
    assert free.lengths.tolist() == [12] * 16 and not free.finished.any()
    last = int(free.tokens[5, 11])  # so that one row ends with its very last token
    eos = [int(free.tokens[0, 4]), int(free.tokens[9, 0]), last]
    stopped = generate(policy, PROMPTS, samples=4, max_new_tokens=12, eos_ids=eos, seed=(6,), progress=bar)
    lengths = []
    for r in range(16):
        tokens = free.tokens[r].tolist()
        ends = [t + 1 for t, token in enumerate(tokens) if token in eos]
        lengths.append(min(ends, default=12))
        assert bool(stopped.finished[r]) == bool(ends)
        assert stopped.tokens[r, : lengths[r]].tolist() == tokens[: lengths[r]]
        assert stopped.depths[r, : lengths[r]].tolist() == free.depths[r, : lengths[r]].tolist()
        assert (stopped.logp_token[r, : lengths[r]] < 0).all() and (stopped.logp_exit[r, : lengths[r]] < 0).all()
        assert not stopped.depths[r, lengths[r] :].any() and not stopped.logp_exit[r, lengths[r] :].any()
    assert stopped.lengths.tolist() == lengths and 1 in lengths
    assert sum(advanced) == 16
    assert len({(length == 12, bool(done)) for length, done in zip(lengths, stopped.finished, strict=True)}) == 3


@pytest.mark.parametrize("prompt, new", [([], 4), ([1] * 125, 4), ([1] * 129, 1), ([1, 2], 127)])
def test_a_prompt_that_is_empty_or_too_long_is_named(prompt, new):
    """Beyond its context a RoPE model talks nonsense without an error."""
    with pytest.raises(UserError, match="prompt 1 has"):
        generate(toy_policy(), [[1], prompt], max_new_tokens=new, eos_ids=NO_EOS)


def test_a_prompt_that_just_fits_is_accepted():
    """The context's last position is usable."""
    samples = generate(toy_policy(), [[1] * 124], max_new_tokens=4, eos_ids=NO_EOS)
    assert samples.lengths.tolist() == [4]


@pytest.mark.parametrize("bad", [dict(max_new_tokens=0), dict(max_new_tokens=4, samples=0)])
def test_a_request_for_nothing_is_refused(bad):
    """It would end in an error about an empty tensor."""
    with pytest.raises(UserError, match="at least 1"):
        generate(toy_policy(), [[1, 2]], eos_ids=NO_EOS, **bad)


# ------------------------------------------------------------------------------------------------ adapters


def test_lora_starts_as_identity():
    """Training would start from a damaged model."""
    ids, model = torch.tensor([PROMPTS[2]]), toy_model()
    with torch.no_grad():
        before = model(ids)
        policy = Policy(model, EXITS, 3)
        assert torch.equal(policy.model(ids), before)
    assert len(policy.adapters) == 7 * L
    assert all(adapter.lora_A.abs().max() > 0 for adapter in policy.adapters)  # else B gets no gradient


def test_lora_adds_alpha_over_r_times_B_A():
    """Another scale, and the adapter means something else in PEFT."""
    policy = Policy(toy_model(), EXITS, 4, alpha=10.0)
    adapter = policy.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        adapter.lora_B.normal_()
        x = torch.randn(28)
        wanted = adapter.weight @ x + 2.5 * (adapter.lora_B @ (adapter.lora_A @ x))
        torch.testing.assert_close(adapter(x[None])[0], wanted)
    assert Policy(toy_model(), EXITS, 4).alpha == 8.0


@pytest.mark.parametrize("recompute", [False, True])
def test_only_lora_and_heads_get_gradient(recompute):
    """The base is the teacher: were it trained, the reference would drift with the student. And all else must learn."""
    policy = toy_policy(model_type="qwen2", tie_word_embeddings=False)
    policy.model.recompute = recompute
    base = {name: p.clone() for name, p in policy.named_parameters() if "lora_" not in name and "heads" not in name}
    batch = collate(PROMPTS, [[1, 2, 3, 4]] * 4, [[2, 6, 4, 6]] * 4, n_layers=L)
    logp_exit, logp_token, token_kl, _ = score(policy, batch, teacher_pass(policy, batch)[0])
    (logp_exit + logp_token + token_kl).sum().backward()
    assert policy.trained().keys() == {name for name, _ in policy.named_parameters()} - base.keys()
    for name, p in policy.named_parameters():
        if name in base:
            assert p.grad is None and not p.requires_grad
        else:
            assert p.grad.isfinite().all() and p.grad.abs().max() > 0
    torch.optim.AdamW(policy.parameters(), lr=1.0).step()
    assert all(torch.equal(dict(policy.named_parameters())[name], p) for name, p in base.items())


def test_recomputing_blocks_leaves_the_policys_gradient_alone():
    """Checkpointed blocks must freeze the same positions when they run again."""
    policy, gradients = toy_policy(), []
    batch = collate(PROMPTS, [[1, 2, 3, 4]] * 4, [[2, 6, 4, 6]] * 4, n_layers=L)
    for policy.model.recompute in (False, True):
        policy.zero_grad()
        logp_exit, logp_token, *_ = score(policy, batch)
        (logp_exit + logp_token).sum().backward()
        gradients.append([p.grad for p in policy.trained().values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_trained_parameters_are_float32_on_a_bfloat16_base():
    """In bf16 an update of 1e-4 of a weight's size is rounded away."""
    policy = Policy(toy_model().bfloat16(), EXITS, 3)
    batch = collate(PROMPTS, [[1, 2]] * 4, [[2, 6]] * 4, n_layers=L)
    parts = score(policy, batch, teacher_pass(policy, batch)[0])
    sum(part.sum() for part in parts).backward()
    assert all(part.dtype == torch.float32 for part in parts)
    assert {p.dtype for p in policy.trained().values()} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in policy.trained().values())
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert generate(policy, PROMPTS, max_new_tokens=3, eos_ids=NO_EOS).logp_token.isfinite().all()


def test_merged_equals_unmerged_and_unmerge_restores():
    """The exported checkpoint is the merged one."""
    policy, ids = toy_policy(), torch.tensor([PROMPTS[2]])
    weights = [adapter.weight.clone() for adapter in policy.adapters]
    with torch.no_grad():
        apart, base = policy(ids).h, toy_model().stream(ids)
        merge(policy)
        assert not any(adapter.on for adapter in policy.adapters)
        torch.testing.assert_close(policy(ids).h, apart, atol=1e-4, rtol=1e-4)
        unmerge(policy)
        assert all(adapter.on for adapter in policy.adapters)
        torch.testing.assert_close(policy(ids).h, apart, atol=1e-4, rtol=1e-4)
        with adapters_off(policy):
            torch.testing.assert_close(policy(ids).h, base, atol=1e-4, rtol=1e-4)
    for adapter, weight in zip(policy.adapters, weights, strict=True):
        torch.testing.assert_close(adapter.weight, weight, atol=1e-6, rtol=0)


def test_adapters_off_nests_and_restores_after_an_error():
    """Left off by an interrupted teacher pass, the student would train no adapter from there on."""
    policy = toy_policy()

    def on():
        return {adapter.on for adapter in policy.adapters}

    with adapters_off(policy):
        assert on() == {False}
        with adapters_off(policy):
            assert on() == {False}
        assert on() == {False}
    assert on() == {True}
    with pytest.raises(KeyboardInterrupt), adapters_off(policy):
        raise KeyboardInterrupt
    assert on() == {True}


# ------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("kind, tied", KINDS)
def test_a_saved_policy_loads_with_identical_outputs(kind, tied, tmp_path):
    """A run would be evaluated as another policy than the one that was trained."""
    changes = dict(model_type=kind, tie_word_embeddings=tied)
    policy = toy_policy(seed=5, exits=(1, 3, 4), rank=2, **changes)
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
    assert set(load_file(tmp_path / "exit_heads.safetensors")) == {"weight", "bias"}


def edit(path, change):
    """Applies `change` to what a JSON or safetensors file holds."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    else:
        value = load_file(path)
        change(value)
        save_file(value, path)


A = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize("name, change, told", [
    ("adapter_model.safetensors", lambda t: t.pop(A), f"missing {A}"),
    ("adapter_model.safetensors", lambda t: t.update({A + "x": t[A].clone()}), f"unexpected {A}x"),
    ("adapter_model.safetensors", lambda t: t.update({A: t[A][:, :-1].clone()}), f"{A} has shape (3, 19), not (3, 20)"),
    ("exit_heads.safetensors", lambda t: t.pop("bias"), "missing bias"),
    ("exit_heads.safetensors", lambda t: t.update({"bias": t["bias"][:1].clone()}), "bias has shape (1,), not (2,)"),
    ("exit_config.json", lambda c: c.update(exits=[2, 4, 5]), "weight has shape (2, 20), not (3, 20)"),
    ("exit_config.json", lambda c: c.update(exits=[4, 9]), "exits [4, 9]"),
    ("exit_config.json", lambda c: c.pop("exits"), "exits"),
    ("adapter_config.json", lambda c: c.pop("r"), "'r'"),
    ("adapter_config.json", lambda c: c.update(r=4), "has shape"),
])
def test_a_policy_that_does_not_fit_is_refused_by_name(name, change, told, tmp_path):
    """A tensor that is skipped stays at its start, and the loaded policy is another one."""
    save_policy(toy_policy(), tmp_path)
    edit(tmp_path / name, change)
    with pytest.raises(UserError) as error:
        load_policy(toy_model(), tmp_path)
    assert told in str(error.value)


@pytest.mark.parametrize("changes, told", [
    (dict(num_hidden_layers=8), "6 layers"), (dict(hidden_size=24), "has shape")])
def test_a_policy_of_another_model_is_refused(changes, told, tmp_path):
    """--model and the run folder are given apart and can disagree."""
    save_policy(toy_policy(), tmp_path)
    with pytest.raises(UserError, match=told):
        load_policy(toy_model(**changes), tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "exit_heads.safetensors",
                                  "exit_config.json"])
def test_a_missing_or_truncated_file_of_a_policy_is_named(name, tmp_path):
    """A run that was killed while it wrote."""
    save_policy(toy_policy(), tmp_path)
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], None):
        (tmp_path / name).unlink()
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_policy(toy_model(), tmp_path)
