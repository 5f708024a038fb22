"""The network of a policy: where exits stand, what freezes, adapters and heads."""

import math

import pytest
import torch
from safetensors.torch import load_file

import fast.packing
import model
import sample
from data.hub import UserError
from exits import ExitHeads, Policy, adapters_off, base_pass, collate, exit_depths, score
from sample import generate
from tests.toys import (
    FIXTURES,
    GOLDEN,
    KINDS,
    PROMPTS,
    L,
    assert_close,
    reference,
    responses,
    set_heads,
    toy_model,
    toy_policy,
)

# -------------------------------------------------------------------------------------------- exits and heads


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


def test_a_model_has_one_policy():
    """Else the first one would run on the second one's adapters, without a word."""
    with pytest.raises(UserError, match="load the model again"):
        Policy(toy_policy().model)


def test_fresh_heads_exit_with_sigmoid_minus_4():
    """A head that starts open ruins the first step."""
    policy = Policy(toy_model(), (2, 4), 2)
    with torch.no_grad():
        assert torch.equal(policy(torch.tensor(PROMPTS[2])[None]).exit_logits, torch.full((1, 7, 2), -4.0))


@pytest.mark.parametrize("hidden", [0, 7])
def test_a_head_reads_the_stream_without_its_length(hidden):
    """A stream's norm grows by orders of magnitude with depth, and the exit logit must not."""
    heads = ExitHeads(3, 20, hidden, 0.5, "cpu").double()
    with torch.no_grad():
        heads.weight.normal_()
        h = torch.randn(20).double()
        x = (h / (h.square().sum() / 20 + 0.5) ** 0.5).tolist()
        if hidden:
            heads.up_bias.normal_()
            sums = [sum(w * a for w, a in zip(row, x, strict=True)) + b
                    for row, b in zip(heads.up[1].tolist(), heads.up_bias[1].tolist(), strict=True)]
            x = [s / (1 + math.exp(-s)) for s in sums]
        assert_close(heads(h, 1), sum(w * a for w, a in zip(heads.weight[1].tolist(), x, strict=True)) - 4)
        heads.eps = 0.0
        assert_close(heads(1000 * h, 1), heads(h, 1))


# ---------------------------------------------------------------------------------- the forward pass and freezing


@pytest.mark.parametrize("kind, tied", KINDS)
@pytest.mark.parametrize("head_width", [0, 5])
def test_parallel_pass_equals_the_reference_at_mixed_depths(kind, tied, head_width):
    """The one place where a stream freezes: streams, lenses and exit logits at every position."""
    policy = toy_policy(model_type=kind, tie_word_embeddings=tied, head_width=head_width).double()
    ids, depths, slow = PROMPTS[2], [6, 6, 2, 4, 6, 2, 4], reference(policy)
    streams = slow.streams(ids, depths)
    with torch.no_grad():
        out = policy(torch.tensor([ids]), torch.tensor([depths]))
    assert out.depths.tolist() == [depths]
    assert_close(out.h[0], streams[L])
    for e, depth in enumerate((2, 4)):
        assert_close(out.at_exits[e][0], streams[depth])
        assert_close(out.exit_logits[0, :, e], slow.exit_logit(streams[depth], e))


@pytest.mark.parametrize("name", GOLDEN)
def test_frozen_logits_equal_transformers_golden_ones(name):
    """Once without the reference: the golden logits are transformers' own, with hooks that freeze tokens."""
    golden = load_file(FIXTURES / name / "golden.safetensors")
    policy = Policy(model.Transformer.from_pretrained(FIXTURES / name), (1,), 2)
    out = policy(golden["ids"], golden["depths"])
    assert_close(policy.model.unembed(out.h), golden["frozen_logits"], 1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_later_layers_own_keys_and_values_of_the_frozen_stream(kind, monkeypatch):
    """Later tokens attend to a frozen one at every depth: copied, stale or adapter-free keys would mislead them.

    Once in the parallel pass, once in the cache after sampling; both against the reference's projections. The cache
    has them as far as some token of the row has run the layer, and the frozen stream for the rest.
    """
    policy, caches, seen = toy_policy(model_type=kind).double(), [], []

    class Recorded(sample.Cache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(sample, "Cache", Recorded)
    drawn = generate(policy, PROMPTS, max_new_tokens=8, eos_ids=[], seed=(6,))
    assert {depth for r in drawn for depth in r.depths} == {2, 4, 6}
    (cache,), lagging, plain, slow = caches, 0, model.causal_attention, reference(policy)
    for where in (model, fast.packing):
        monkeypatch.setattr(where, "causal_attention", lambda q, k, v: seen.append((k, v)) or plain(q, k, v))
    for row, r in enumerate(drawn):
        ids, depths = [*r.prompt_ids, *r.token_ids[:-1]], [L] * (len(r.prompt_ids) - 1) + r.depths
        streams = slow.streams(ids, depths)
        seen.clear()
        with torch.no_grad():
            policy(torch.tensor([ids]), torch.tensor([depths]))
        for layer in range(L):
            at = f"model.layers.{layer}"
            _, *wanted = slow.queries_keys_values(slow.norm(streams[layer], f"{at}.input_layernorm"), f"{at}.self_attn")
            filled = max([t + 1 for t, depth in enumerate(depths) if depth > layer], default=0)
            assert cache.filled[layer // 2, row] == filled
            lagging += filled < len(ids)
            for parallel, cached, keys in zip(seen[layer], (cache.k, cache.v), wanted, strict=True):
                assert_close(parallel[0], keys.transpose(0, 1))
                assert_close(cached[layer, row, :filled], keys.transpose(0, 1)[:filled])
            assert_close(cache.streams[row, filled : len(ids)], streams[L][filled:])
    assert lagging


# ------------------------------------------------------------------------------------------------ the base model


@pytest.mark.parametrize("kind, tied", KINDS)
def test_closed_heads_and_switched_off_adapters_are_the_base_model_bit_for_bit(kind, tied):
    """Teacher and reference policy are the student's own weights: any difference would be distilled and penalised."""
    changes = dict(model_type=kind, tie_word_embeddings=tied)
    ids, policy = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]]), toy_policy(**changes)
    with torch.no_grad():
        logits = toy_model(**changes)(ids)
        assert not torch.allclose(policy.model(ids), logits, atol=0.1)  # the adapters do change it
        with adapters_off(policy):
            assert torch.equal(policy.model(ids), logits)
            assert torch.equal(policy.model.unembed(policy(ids).h), logits)
            for closed in (-1e9, -math.inf):
                set_heads(policy, closed)
                drawn = policy(ids, u=torch.zeros(2, 7, 2))
                assert torch.equal(policy.model.unembed(drawn.h), logits)
                assert (drawn.depths == L).all()


def test_closed_heads_and_switched_off_adapters_sample_what_the_base_model_would():
    """The base's responses are sampled by the same loop."""
    base, policy, tokens = toy_model().double(), set_heads(toy_policy().double(), -1e9), []
    with torch.no_grad():
        for _ in range(9):
            tokens.append(int(base(torch.tensor([PROMPTS[0] + tokens]))[0, -1].argmax()))
    with adapters_off(policy):
        (r,) = generate(policy, PROMPTS[:1], max_new_tokens=9, eos_ids=[], temperature=0)
    assert r.token_ids == tokens and r.depths == [L] * 9 and r.logp_exit == [0.0] * 9


def test_adapters_off_nests_and_restores_after_an_error():
    """Left off by an interrupted pass of the base, the student would train no adapter from there on."""
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


# ------------------------------------------------------------------------------------------- adapters and training


def test_lora_starts_as_identity():
    """Training would start from a damaged model."""
    ids, model = torch.tensor([PROMPTS[2]]), toy_model()
    with torch.no_grad():
        before = model(ids)
        policy = Policy(model, (2, 4), 3)
        assert torch.equal(policy.model(ids), before)
    assert len(policy.adapters) == 7 * L
    assert all(adapter.lora_A.abs().max() > 0 for adapter in policy.adapters)  # else B gets no gradient


def test_what_is_trained_starts_at_the_usual_scale():
    """At another one every rate in the README is another rate: A as in PEFT, a head's hidden units of unit variance."""
    policy = Policy(toy_model(), (2, 4), 64, head_width=256)
    for adapter in policy.adapters:
        assert 0.95 < adapter.lora_A.abs().max() * adapter.weight.shape[1] ** 0.5 <= 1
    assert 0.9 < policy.heads.up.var() * 20 < 1.1


def test_lora_adds_alpha_over_r_times_B_A():
    """Another scale, and the adapter means something else in PEFT."""
    policy = Policy(toy_model(), (2, 4), 4, alpha=10.0).double()
    adapter = policy.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        adapter.lora_B.normal_()
        x = torch.randn(28).double()
        assert_close(adapter(x[None])[0], adapter.weight @ x + 2.5 * (adapter.lora_B @ (adapter.lora_A @ x)))
    assert Policy(toy_model(), (2, 4), 4).alpha == 8.0


def loss_of(policy):
    """Anything that depends on all that is trained."""
    batch = collate(responses(PROMPTS, [[1, 2, 3, 4]] * 4, [[2, 6, 4, 6]] * 4), L)
    parts = score(policy, batch, base_pass(policy, batch)[0])[:3]
    return parts, sum(part.sum() for part in parts)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_lora_and_heads_get_gradient(recompute):
    """The base is the teacher: were it trained, the reference would drift with the student. And all else must learn."""
    policy = toy_policy(model_type="qwen2", tie_word_embeddings=False)
    policy.model.recompute = recompute
    base = {name for name, _ in policy.named_parameters() if "lora_" not in name and "heads" not in name}
    loss_of(policy)[1].backward()
    assert policy.trained().keys() == {name for name, _ in policy.named_parameters()} - base
    for name, p in policy.named_parameters():
        if name in base:
            assert p.grad is None and not p.requires_grad
        else:
            assert p.grad.isfinite().all() and p.grad.abs().max() > 0


def test_recomputing_blocks_leaves_the_policys_gradient_alone():
    """Checkpointed blocks must freeze the same positions when they run again; and run again, or long sequences would
    not fit."""
    policy, gradients, calls = toy_policy().double(), [], []
    policy.model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for policy.model.recompute in (False, True):
        policy.zero_grad()
        loss_of(policy)[1].backward()
        gradients.append([p.grad for p in policy.trained().values()])
    assert len(calls) == 2 + 3  # the base's pass and the policy's, then that twice
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)


def test_trained_parameters_are_float32_on_a_bfloat16_base():
    """In bf16 an update of 1e-4 of a weight's size is rounded away."""
    policy = Policy(toy_model().bfloat16(), (2, 4), 3)
    parts, loss = loss_of(policy)
    loss.backward()
    assert {part.dtype for part in parts} == {torch.float32}
    assert {p.dtype for p in policy.trained().values()} == {torch.float32}
    assert {p.grad.dtype for p in policy.trained().values()} == {torch.float32}
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(math.isfinite(x) for r in generate(policy, PROMPTS, max_new_tokens=3, eos_ids=[])
               for x in r.logp_token)
