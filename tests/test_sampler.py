"""Sampling: what is drawn, that it is what training scores, and that frozen and ended tokens cost nothing."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch

import fast.cache
import sample
from data.hub import UserError
from exits import adapters_off, base_pass, collate, joint_logp, score, token_logp_all
from fast.cache import Cache, fitting_rows, row_bytes
from fast.packing import Sequences
from sample import generate, uniforms
from tests.chance import assert_frequencies, splitmix
from tests.reference import stick_breaking
from tests.toys import (
    KINDS,
    PROMPTS,
    L,
    assert_close,
    reference,
    responses,
    set_heads,
    toy_model,
    toy_on,
    toy_policy,
)

OFTEN = range(0, 61, 9)  # so many tokens end a response that lengths differ


def actions(drawn):
    """What was drawn: tokens and depths of each response."""
    return [(r.token_ids, r.depths) for r in drawn]


def logps(drawn):
    """Both log-probabilities of every token, (2, N)."""
    return torch.tensor([[x for r in drawn for x in getattr(r, name)] for name in ("logp_exit", "logp_token")],
                        dtype=torch.double)


# ---------------------------------------------------------------------------- what is drawn is what is scored


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind, tied", KINDS)
def test_the_same_dice_give_the_references_sample(kind, tied, graphs):
    """The whole sampler, cache, late keys and batches included, against a loop that reads its text anew every time."""
    policy = toy_policy(seed=2, model_type=kind, tie_word_embeddings=tied).double()
    policy.model.graphs = graphs
    drawn, slow = generate(policy, PROMPTS, samples=2, max_new_tokens=7, eos_ids=[], seed=(4, 2, 1)), reference(policy)
    for row in (1, 2, 5, 6):
        def dice(t, row=row):
            return [splitmix(4, 2, 1, row, t, i) for i in range(3)]
        assert (drawn[row].token_ids, drawn[row].depths) == slow.sample(PROMPTS[row // 2], 7, dice)
    assert {depth for r in drawn for depth in r.depths} == {2, 4, 6}


@pytest.mark.parametrize("used, bias, temperature, delta", [
    ({2, 4, 6}, None, 1.0, 0.0), ({2, 4, 6}, None, 0.7, 0.8), ({2}, 1e9, 1.0, 0.0), ({6}, -1e9, 0.7, 0.0)])
@pytest.mark.parametrize("kind, tied", KINDS)
def test_cached_sampling_equals_teacher_forced_scoring(kind, tied, used, bias, temperature, delta):
    """The central invariant: the trainer scores what the sampler did. Broken, every policy gradient is of another
    policy than the one that acted."""
    policy = toy_policy(seed=2, model_type=kind, tie_word_embeddings=tied).double()
    if bias is not None:
        set_heads(policy, bias)
    drawn = generate(policy, PROMPTS, samples=3, max_new_tokens=14, eos_ids=OFTEN, seed=(4, 2), temperature=temperature,
                     delta=delta, rows=6)
    assert {depth for r in drawn for depth in r.depths} == used and len({len(r) for r in drawn}) > 2

    def scored(rows):
        batch = collate(rows, L)
        with torch.no_grad():
            out = policy(batch.ids, batch.depths, place=batch.place)
            parts = joint_logp(policy, out.h[batch.predicting], out.exit_logits[batch.predicting],
                               batch.depths[batch.row, batch.position], batch.tokens, temperature=temperature,
                               delta=delta)[:2]
            if temperature == 1.0 and delta == 0.0:
                assert_close(torch.stack(score(policy, batch)[:2]), torch.stack(parts), 0)
        return torch.stack(parts)

    assert_close(logps(drawn), scored(drawn))
    assert_close(logps(drawn[::5]), torch.cat([scored([r]) for r in drawn[::5]], 1))
    r = min(drawn, key=lambda r: (len(set(r.depths)) == 1, len(r) < 3, len(r.prompt_ids) + len(r)))
    slow = reference(policy).score(r.prompt_ids, r.token_ids, r.depths, temperature=temperature, delta=delta)
    assert_close([r.logp_exit, r.logp_token], slow[:2])
    batch = collate([r], L)
    with torch.no_grad():
        out = policy(batch.ids, batch.depths)
        kl = joint_logp(policy, out.h[batch.predicting], out.exit_logits[batch.predicting], torch.tensor(r.depths),
                        base_h=base_pass(policy, batch)[0], temperature=temperature, delta=delta)[2]
    assert_close(kl, slow[2])


WAYS = [dict(rows=1), dict(rows=5), {}, dict(LONG=0), dict(graphs=True), dict(graphs=True, rows=7)]


def every_way(policy, monkeypatch, prompts, **options):
    """A sample by each way to decode: few rows or many, one attention call or one a row, packed or fixed shapes."""
    for way in WAYS:
        monkeypatch.setattr(fast.cache, "LONG", way.get("LONG", 2**15))
        policy.model.graphs = way.get("graphs", False)
        yield generate(policy, prompts, rows=way.get("rows"), **options)


def test_every_way_to_decode_draws_the_same_sample(monkeypatch):
    """Batching, compaction, late keys and values and fixed shapes are for speed: none may change what is sampled."""
    options = dict(samples=3, max_new_tokens=16, eos_ids=[7, 30], seed=(2, 7))
    whole, *others = every_way(toy_policy().double(), monkeypatch, PROMPTS, **options)
    for again in others:
        assert actions(again) == actions(whole)
        assert_close(logps(again), logps(whole))


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_sampler_and_trainer_agree_to_rounding_in_the_dtypes_of_real_runs(dtype, rounding, monkeypatch):
    """With the kernels of these dtypes, which the tests in float64 don't take."""
    policy = toy_policy(seed=2)
    policy.model.to(dtype)
    for drawn in every_way(policy, monkeypatch, PROMPTS, samples=3, max_new_tokens=14, eos_ids=OFTEN, seed=(4, 2)):
        scores = torch.stack(score(policy, collate(drawn, L))[:2])
        assert_close(logps(drawn), scores.detach(), rounding)
        scores.sum().backward()  # by adapters that are their own again
        assert all(adapter.lora_B.grad.any() for adapter in policy.adapters)
        policy.zero_grad()


def test_exits_drawn_in_the_parallel_pass_equal_those_drawn_step_by_step():
    """Stage 1 reports the exits drawn in a parallel pass as the learned distribution."""
    policy = toy_policy(seed=2).double()
    for delta in (0.0, -1.0):
        drawn = generate(policy, PROMPTS, samples=2, max_new_tokens=12, eos_ids=[7, 8, 9], seed=(5, 6), delta=delta)
        batch = collate(drawn, L)
        u = torch.ones(*batch.ids.shape, 2, dtype=torch.float64)  # a position that may not exit
        for row, position in zip(batch.row.tolist(), batch.position.tolist(), strict=True):
            u[row, position] = torch.tensor([splitmix(5, 6, row, position, e) for e in (1, 2)])
        with torch.no_grad():
            out = policy(batch.ids, L * (batch.depths > 0), u, delta, batch.place)
        assert torch.equal(out.depths, batch.depths)
        assert len(batch.depths[batch.row, batch.position].unique()) == 3


# ----------------------------------------------------------------------------------------------- frequencies


@torch.no_grad()
def joint(policy, prompt, response=(), depths=(), **options):
    """The reference's table (E + 1, V) of (depth, token) after a prompt and the beginning of a response."""
    before = [policy.n_layers] * (len(prompt) - 1) + list(depths)
    p_exit, p_token = reference(policy).policy([*prompt, *response], before, **options)
    return stick_breaking(p_exit)[:, None] * p_token


@pytest.mark.parametrize("temperature, delta", [(1.0, 0.0), (0.7, 1.0), (1.6, -0.7)])
def test_sampler_frequencies_equal_the_joint(temperature, delta):
    """A sampler that truncates, or that uses other odds than it reports, makes every reward estimate one of another
    policy. 3 depths x 7 tokens, 4,000 samples, against the reference's table; false alarm: one seed in a million."""
    policy, prompt, counts = toy_policy(vocab_size=7), [3, 6, 0, 2], np.zeros((3, 7))
    for r in generate(policy, [prompt], samples=4000, max_new_tokens=1, eos_ids=[], seed=(1,),
                      temperature=temperature, delta=delta):
        counts[r.depths[0] // 2 - 1, r.token_ids[0]] += 1
    assert_frequencies(counts, joint(policy, prompt, temperature=temperature, delta=delta))


def test_sampler_frequencies_equal_the_joint_over_two_steps():
    """The second step reads what the first one wrote: its token, its depth, its frozen keys and values; and token 2
    ends a response. 2 depths x 3 tokens, twice, 6,000 samples; false alarm: one seed in a million."""
    policy, prompt, p = toy_policy(vocab_size=3, exits=(3,)), [1, 2, 0], {}
    first = joint(policy, prompt)
    for i, depth in enumerate((3, 6)):
        p[(2,), (depth,)] = float(first[i, 2])
        for token in (0, 1):
            second = joint(policy, prompt, [token], [depth])
            for j, next_depth in enumerate((3, 6)):
                for next_token in range(3):
                    p[(token, next_token), (depth, next_depth)] = float(first[i, token] * second[j, next_token])
    counts = dict.fromkeys(p, 0)
    for r in generate(policy, [prompt], samples=6000, max_new_tokens=2, eos_ids=[2], seed=(8,)):
        counts[tuple(r.token_ids), tuple(r.depths)] += 1
    assert_frequencies(list(counts.values()), list(p.values()))


def test_with_a_threshold_exits_are_where_their_probability_says_so():
    """p above it at the first exit reached, whatever the dice; and what was drawn is scored as sampling would have."""
    policy, slow = toy_policy(2).double(), reference(toy_policy(2).double())
    drawn = generate(policy, PROMPTS, max_new_tokens=9, eos_ids=[], threshold=0.4, delta=0.2)
    assert len({d for r in drawn for d in r.depths}) > 1
    for r in drawn:
        for t in range(len(r)):
            before = [L] * (len(r.prompt_ids) - 1) + r.depths[:t]
            p, _ = slow.policy([*r.prompt_ids, *r.token_ids[:t]], before, delta=0.2)
            stop = [*(p > 0.4).tolist(), True].index(True)
            assert r.depths[t] == slow.depth_of_outcome[stop]
            assert_close(r.logp_exit[t], (1 - p[:stop]).log().sum() + (p[stop].log() if stop < len(p) else 0))


@pytest.mark.parametrize("threshold, rows", [(None, 3), (None, 8), (0.4, 8)])
def test_a_prompts_tokens_exit_as_well(threshold, rows):
    """Depths and scores are those of one pass over the whole text with the sampler's coins."""
    policy = toy_policy(2).double()
    options = dict(samples=2, max_new_tokens=6, eos_ids=[], threshold=threshold, seed=(3,), delta=0.2, rows=rows)
    drawn = generate(policy, PROMPTS, prompt_exits=True, **options)
    for row, r in enumerate(drawn):
        ids, first = torch.tensor([r.prompt_ids + r.token_ids[:-1]]), len(r.prompt_ids) - 1
        u = uniforms((3,), row, range(ids.shape[1]), 3)[None, :, 1:]
        found = policy(ids, torch.full(ids.shape, L), torch.full_like(u, threshold) if threshold else u, delta=0.2)
        assert found.depths[0, first:].tolist() == r.depths
        logp = token_logp_all(policy.model, found.h[0, first:]).gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0]
        assert_close(torch.tensor(r.logp_token, dtype=torch.double), logp)
    assert logps(drawn).ne(logps(generate(policy, PROMPTS, **options))).any()  # prompts do exit


def test_temperature_zero_takes_the_likeliest_token_and_still_draws_exits():
    """Greedy evaluation of a policy whose exits were no longer drawn would measure another depth."""
    policy, prompt = toy_policy(5, vocab_size=7).double(), [3, 6, 0, 2]
    table = joint(policy, prompt)
    drawn = generate(policy, [prompt], samples=2000, max_new_tokens=1, eos_ids=[], seed=(1,), temperature=0)
    likeliest = {depth: int(table[i].argmax()) for i, depth in enumerate((2, 4, 6))}
    assert len(set(likeliest.values())) > 1
    assert [likeliest[r.depths[0]] for r in drawn] == [r.token_ids[0] for r in drawn]
    assert_frequencies([sum(r.depths == [depth] for r in drawn) for depth in (2, 4, 6)], table.sum(-1))
    wanted = {depth: float(table[i, likeliest[depth]]) for i, depth in enumerate((2, 4, 6))}
    assert_close(logps(drawn).sum(0).exp(), [wanted[r.depths[0]] for r in drawn])  # scored at temperature 1


def test_full_depth_responses_do_not_depend_on_where_exits_would_be():
    """Runs of different exits are compared on the same problems against the same base responses."""
    drawn = []
    for exits in ((2, 4), (1, 2, 3, 5)):
        with adapters_off(toy_policy(seed=3, exits=exits).double()) as base:
            drawn.append(actions(generate(base, PROMPTS, max_new_tokens=9, eos_ids=[], depths=L)))
    assert drawn[0] == drawn[1]


# --------------------------------------------------------------------------- whatever shares the batch or the cache


def test_prompts_prefilled_in_several_passes_are_those_of_one(monkeypatch):
    """Memory bounds a pass; a prompt's keys must not land in another's rows, nor one of a single token stop it."""
    policy, prompts = toy_policy().double(), [[4], [6], *PROMPTS]
    options = dict(samples=2, max_new_tokens=6, eos_ids=OFTEN, seed=(1, 9))
    whole, passes, run = generate(policy, prompts, **options), [], Sequences.run
    monkeypatch.setattr(Sequences, "run", lambda self, *args: passes.append(self.shape) or run(self, *args))
    monkeypatch.setattr(sample, "PREFILL", 6)
    again = generate(policy, prompts, **options)
    assert len(passes) > 1 and max(B * T for B, T in passes) <= max(6, *map(len, prompts))
    assert actions(again) == actions(whole)
    assert_close(logps(again), logps(whole))


def test_a_responses_sample_depends_neither_on_the_rows_nor_on_other_prompts():
    """Results would change with the memory of the machine. Rows leave the cache at different steps here."""
    policy, widths = toy_policy().double(), []
    handle = policy.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    options = dict(samples=4, max_new_tokens=20, eos_ids=OFTEN, seed=(1, 9))
    whole = generate(policy, PROMPTS, **options)
    assert widths[0] == 16 and widths[-1] < 8 and widths == sorted(widths, reverse=True)  # finished rows left
    handle.remove()
    for rows in (1, 8):
        again = generate(policy, PROMPTS, rows=rows, **options)
        assert actions(again) == actions(whole)
        assert [r.finished for r in again] == [r.finished for r in whole]
        assert_close(logps(again), logps(whole))
    assert actions(generate(policy, PROMPTS[:1], **options)) == actions(whole[:4])
    assert actions(generate(policy, PROMPTS[1:], first_response=4, **options)) == actions(whole[4:])
    assert len({(i // 4, *r.token_ids) for i, r in enumerate(whole)}) > 12  # samples differ
    other_seed = generate(policy, PROMPTS, **{**options, "seed": (1, 8)})
    assert [r.token_ids[0] for r in other_seed] != [r.token_ids[0] for r in whole]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_samples_and_scores_on_cuda_are_the_cpus():
    """In float32, with graphs and without."""
    options = dict(samples=3, max_new_tokens=24, eos_ids=[7, 30], seed=(2, 7))
    wanted = generate(toy_policy(), PROMPTS, **options)
    policy = toy_on("cuda")
    for policy.model.graphs in (False, True):
        drawn = generate(policy, PROMPTS, **options)
        assert actions(drawn) == actions(wanted)
        assert_close(logps(drawn), logps(wanted), 1e-4)
    batch = collate(wanted, L, device="cuda")
    logp_exit, logp_token, token_kl, *_ = score(policy, batch, base_pass(policy, batch)[0])
    token_kl.sum().backward()
    assert_close(torch.stack([logp_exit, logp_token]).cpu(), logps(wanted), 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("graphs", [False, True])
def test_in_bfloat16_on_cuda_what_is_sampled_is_scored_alike_and_learned_from_as_in_float32(graphs):
    """It has attention kernels of its own. On a CPU in bfloat16 the means are 0.007 and 0.012, the cosine 0.998."""
    policies, found = (toy_on("cuda", torch.bfloat16), toy_on("cpu")), []
    policies[0].model.graphs = graphs
    drawn = generate(policies[0], PROMPTS, samples=3, max_new_tokens=24, eos_ids=[7, 30], seed=(2, 7))
    for policy in policies:
        logp_exit, logp_token, *_ = score(policy, collate(drawn, L, policy.device))
        (logp_exit + logp_token).sum().backward()
        found.append((torch.stack([logp_exit, logp_token]).detach().cpu(),
                      torch.cat([p.grad.flatten().cpu() for p in policy.trained().values()])))
    (ours, gradient), (plain, plain_gradient) = found
    for other in (torch.as_tensor(logps(drawn)), plain):
        assert (ours - other).abs().mean() < 0.03
    assert torch.cosine_similarity(gradient, plain_gradient, dim=0) > 0.98


# --------------------------------------------------------------------------------------- what nobody runs costs nothing


def test_rows_that_enter_each_mlp_while_sampling_are_the_rows_still_running():
    """The saving is real only if frozen and finished rows cost nothing. Each row is recognised by its input."""
    policy, step, seen = toy_policy().double(), [-1], {}

    def count_steps(*_):
        step[0] += 1

    policy.register_forward_pre_hook(count_steps)
    for layer, block in enumerate(policy.model.model.layers):
        for name, part in (("mlp", block.mlp), ("q_proj", block.self_attn.q_proj), ("o_proj", block.self_attn.o_proj)):
            def record(_, args, key=(name, layer)):
                seen.setdefault((*key, step[0]), []).append(args[0])
            part.register_forward_pre_hook(record)
    drawn = generate(policy, PROMPTS, samples=3, max_new_tokens=15, eos_ids=OFTEN, seed=(1,))
    assert len({len(r) for r in drawn}) > 3
    assert {depth for r in drawn for depth in r.depths} == {2, 4, 6}

    sampled, seen = seen, {}
    step[0] = -1
    batch = collate(drawn, L)
    with torch.no_grad():
        policy(batch.ids, batch.depths, place=batch.place)
    for name in ("mlp", "q_proj", "o_proj"):
        for layer in range(L):
            # The parallel pass packs what runs, too: each prompt once, then every token that goes beyond this layer.
            (parallel,), packed = seen[name, layer, 0], (batch.depths > layer).nonzero().tolist()
            assert len(parallel) == len(packed)
            for t in range(max(map(len, drawn))):
                running = [packed.index([row, len(r.prompt_ids) - 1 + t]) for row, r in enumerate(drawn)
                           if t < len(r) and r.depths[t] > layer]
                inputs = torch.cat(sampled.get((name, layer, t), [parallel[:0]]))
                assert_close(inputs, parallel[running])


def test_layers_that_no_row_runs_do_no_work_at_all_and_late_keys_come_in_one_product():
    """Wall clock follows depth only if frozen tokens ask nothing of later layers until a later token needs them."""
    policy, seen = toy_policy(), []
    for layer, block in enumerate(policy.model.model.layers):
        for name in "qk":
            getattr(block.self_attn, f"{name}_proj").register_forward_pre_hook(
                lambda _, args, at=layer, name=name: seen.append((at, name, len(args[0]))))
    # Row 0 stays at depth 2 for five tokens, goes to 6, then to 4; row 1 never leaves depth 2.
    depths = torch.tensor([[2, 2, 2, 2, 2, 6, 4, 4], [2] * 8])
    generate(policy, [[7], [8]], max_new_tokens=8, eos_ids=[], depths=depths)
    got = [[(name, n) for at, name, n in seen if at == layer] for layer in range(L)]
    assert got[0] == got[1] == [("q", 2), ("k", 2)] * 8
    assert got[2] == got[3] == [("q", 1), ("k", 6), ("q", 1), ("k", 1), ("q", 1), ("k", 1)]
    assert got[4] == got[5] == [("q", 1), ("k", 6)]
    # The parallel pass: padding gives no keys either.
    seen.clear()
    batch = collate(responses([[7], [8, 9]], [[1, 2, 3, 4, 5], [6]], [[2, 4, 6, 2, 2], [4]]), L)
    policy(batch.ids, batch.depths)
    assert seen == [(layer, name, n) for layer, running in enumerate((7, 7, 4, 4, 2, 2))
                    for name, n in (("q", running), ("k", 7))]


@pytest.mark.parametrize("samples, rows, reads", [(2, 16, 24), (2, 6, 48), (8, 8, 48), (3, 2, 48), (8, 48, 6)])
def test_rows_that_end_are_replaced_and_a_prompts_samples_share_its_pass(samples, rows, reads):
    """Else the longest response of every batch holds up all others, and a prompt is read once for each sample; which it
    is where rows are few, for else eight samples would wait until eight rows are free."""
    policy, busy, prefills = toy_policy(), [], []
    policy.register_forward_pre_hook(lambda _, args: busy.append(int((args[1] > 0).sum())))
    first = policy.model.model.layers[0].self_attn.o_proj
    first.register_forward_pre_hook(lambda _, args: prefills.append(len(args[0])))
    drawn = generate(policy, [[5, 17, 42]] * (48 // samples), samples=samples, max_new_tokens=9,
                     eos_ids=range(0, 61, 5), depths=L, rows=rows, seed=(1,))
    lengths = [len(r) for r in drawn]
    assert len(set(lengths)) > 4
    assert max(busy) == rows and sum(busy) == sum(lengths)
    assert len(busy) <= sum(max(lengths[i : i + rows]) for i in range(0, 48, rows)) - (rows < 48)  # batch after batch
    # Of every prompt that is read the two leading tokens; every other call is a step's running rows.
    assert sum(prefills) - sum(busy) == reads * 2


@pytest.mark.parametrize("graphs", [False, True])
def test_the_cache_ends_with_the_call_that_made_it(graphs, monkeypatch):
    """It is the largest thing there is: waiting for Python's cycle collector, rollout after rollout would pile up."""
    caches = []

    class Watched(Cache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(sample, "Cache", Watched)
    policy = toy_policy()
    policy.model.graphs = graphs
    gc.disable()
    try:
        generate(policy, PROMPTS, samples=2, max_new_tokens=6, eos_ids=[7])
        assert len(caches) == 1 and caches[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("free, wanted", [(0, 1), (2**20, None), (2**50, 256)])
def test_rows_follow_free_memory(free, wanted, monkeypatch):
    """A fixed number either runs out of memory or leaves most of it idle."""
    config, like = toy_model().config, torch.zeros(1)
    size = row_bytes(config, 30, like)
    assert size == 30 * (2 * L * config.num_key_value_heads * config.head_dim + config.hidden_size) * 4
    cache = Cache(config, 5, 30, 3, like)
    assert sum(t.numel() * t.element_size() for t in (cache.k, cache.v, cache.streams)) == 5 * size
    monkeypatch.setattr(fast.cache.Path, "read_text", lambda path: f"MemFree: 7 kB\nMemAvailable:  {free // 1024} kB\n")
    assert fitting_rows(config, 30, like) == (wanted or free // 2 // size)


def test_weights_that_overflow_are_told():
    """Else the last token of the vocabulary is drawn again and again, and graded."""
    policy = toy_policy()
    policy.model.model.norm.weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        generate(policy, PROMPTS, max_new_tokens=3, eos_ids=[])


# ------------------------------------------------------------------------------------------- what may be asked for


def test_prescribed_depths_are_run_and_scored():
    """The fixed-depth baselines, and a replay of recorded depths."""
    policy = toy_policy().double()
    slow, options = reference(policy), dict(samples=2, max_new_tokens=5, eos_ids=[0, 9, 18], seed=(1,))
    table = torch.tensor([2, 4, 6, 6, 2, 4, 4] * 6)[:40].view(8, 5)
    for depths in (2, 4, 6, table):
        for i, r in enumerate(generate(policy, PROMPTS, depths=depths, **options)):
            assert r.depths == ([depths] * 5 if isinstance(depths, int) else table[i].tolist())[: len(r)]
            if depths is table and i in (0, 5, 6):
                assert_close([r.logp_exit, r.logp_token], slow.score(r.prompt_ids, r.token_ids, r.depths)[:2])
    drawn = generate(policy, PROMPTS, **options)
    for i, r in enumerate(drawn):
        table[i, : len(r)] = torch.tensor(r.depths)
    assert actions(generate(policy, PROMPTS, depths=table, **options)) == actions(drawn)  # exits have dice of their own
    for bad, told in ((3, "among"), (table[0], "must be one number, or"), (table[:, :4], "must be one number, or")):
        with pytest.raises(UserError, match=told):
            generate(policy, PROMPTS, depths=bad, **options)


def test_any_eos_ends_a_response_and_is_counted():
    """The eos is an action: it has a depth, a log-probability, and a place in the length."""
    policy, advanced, lengths = toy_policy().double(), [], []
    bar = type("Bar", (), {"update": lambda self, n: advanced.append(n)})()
    options = dict(samples=4, max_new_tokens=12, seed=(7,))
    free = generate(policy, PROMPTS, eos_ids=[], **options)
    assert all(len(r) == 12 and not r.finished for r in free)
    eos = [free[0].token_ids[4], free[9].token_ids[0], free[5].token_ids[11]]  # one row ends with its very last token
    for r, whole in zip(generate(policy, PROMPTS, eos_ids=eos, progress=bar, **options), free, strict=True):
        ends = [t + 1 for t, token in enumerate(whole.token_ids) if token in eos]
        n = min(ends, default=12)
        assert (r.token_ids, r.depths, r.finished) == (whole.token_ids[:n], whole.depths[:n], bool(ends))
        assert len(r.logp_exit) == len(r.logp_token) == n and max(r.logp_exit + r.logp_token) < 0
        lengths.append((n, r.finished))
    assert sum(advanced) == 16
    assert (1, True) in lengths and (12, True) in lengths and (12, False) in lengths


@pytest.mark.parametrize("prompt, new", [([], 4), ([1] * 125, 4), ([1] * 129, 1), ([1, 2], 127)])
def test_a_prompt_that_is_empty_or_too_long_is_named(prompt, new):
    """Beyond its context a RoPE model talks nonsense without an error."""
    with pytest.raises(UserError, match="prompt 1 has"):
        generate(toy_policy(), [[1], prompt], max_new_tokens=new, eos_ids=[])


@pytest.mark.parametrize("prompt, new, told", [([1, 61], 4, "prompt 0 has ids from 1 to 61"), ([-1], 4, "from -1 to"),
                                               ([1], 0, "max_new_tokens 0")])
def test_what_cannot_be_continued_is_told(prompt, new, told):
    """Else an index of torch's is out of range, or -1 reads the last embedding."""
    with pytest.raises(UserError, match=told):
        generate(toy_policy(), [prompt], max_new_tokens=new, eos_ids=[])


def test_a_prompt_that_just_fits_is_accepted():
    """The context's last position is usable."""
    (r,) = generate(toy_policy(), [[1] * 124], max_new_tokens=4, eos_ids=[])
    assert len(r) == 4 and all(map(math.isfinite, r.logp_token))
