"""The CUDA path on a simulated device: results against the CPU's, waits of the host against a budget.

test_cuda_path.py runs this file in a process of its own, since `install` puts the device into torch itself. By hand:
python -m pytest tests/cuda_path.py, with -k and --durations as usual.
"""

import argparse
from dataclasses import asdict
from functools import cache, partial

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests import simcuda

simcuda.install()

import checkpoints  # noqa: E402
import distill  # noqa: E402
import optim  # noqa: E402
import rloo  # noqa: E402
import runs  # noqa: E402
import sample  # noqa: E402
from exits import Policy, Response, base_pass, collate, score  # noqa: E402
from fast import chunks, graphs, packing  # noqa: E402
from fast.cache import Cache, NextTokens  # noqa: E402
from fast.graphs import Graphs  # noqa: E402
from flags import EMBEDDED  # noqa: E402
from model import Transformer  # noqa: E402
from tests.toys import toy_model, toy_on  # noqa: E402

EXITS, L, E = (1, 2), 4, 2  # few layers, since an op on the device costs 0.1 ms
PROMPTS = [[3, 5, 7, 9], [1, 2], [8], [4, 4, 4], [20, 21, 22, 23, 24, 25]]
RAGGED = list(range(0, 61, 7))  # so many ids end a response that few reach the limit
MIXED = torch.tensor([1, 2, 4])[torch.arange(10 * 7).view(10, 7) * 5 % 3]
on = partial(toy_on, exits=EXITS, num_hidden_layers=L)  # (device, dtype)
FLAGS = argparse.Namespace(keep=2, shard=False, micro_batch=3, kl_factor=1.0, seed=0, beta=0.02, max_new_tokens=7)


def both(function):
    """function("cuda") and function("cpu"), this one untouched by the simulation."""
    with _disable_current_modes():
        want = function("cpu")
    return function("cuda"), want


def assert_same(got, want, rtol: float = 0.0) -> None:
    """Numbers, tensors and whatever holds them; floating point up to rtol of the largest value."""
    if isinstance(want, torch.Tensor):
        got, want = got.detach().cpu(), want.detach().cpu()
        assert got.shape == want.shape and got.dtype == want.dtype
        assert not want.is_floating_point() or not torch.isnan(got).any()
        if rtol == 0 or not want.is_floating_point():
            assert torch.equal(got, want)
        else:
            assert (got.double() - want.double()).abs().max() <= rtol * want.double().abs().max()
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key], rtol)
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b, rtol)
    else:
        assert got == pytest.approx(want, rel=rtol, abs=rtol) if isinstance(want, float) else got == want


def responses_of(policy: Policy, **options) -> list[dict]:
    options = dict(samples=2, max_new_tokens=7, eos_ids=RAGGED, seed=(1,), rows=4) | options
    return [asdict(r) for r in sample.generate(policy, PROMPTS, **options)]


@cache
def some_responses(samples: int = 1) -> list[Response]:
    return sample.generate(on("cpu"), PROMPTS, samples=samples, max_new_tokens=6, eos_ids=RAGGED)


# ------------------------------------------------------------------------------------------- the simulator itself


def captured(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = function()
    return graph, out


def test_mixing_devices_is_refused():
    cpu, at = torch.arange(6.0).view(2, 3), torch.tensor([0])
    gpu = cpu.to("cuda")
    for bad in (lambda: cpu + gpu, lambda: gpu @ cpu.T, lambda: torch.cat([gpu, cpu]), lambda: gpu.index_select(0, at),
                lambda: gpu.gather(1, torch.zeros(2, 1, dtype=torch.long)), lambda: cpu.add_(gpu),
                lambda: gpu.add_(cpu), lambda: cpu[at.to("cuda")], lambda: torch.where(gpu > 0, gpu, cpu),
                lambda: cpu.sum().add_(gpu.sum()), lambda: gpu.__setitem__(at.to("cuda"), cpu[:1])):
        with pytest.raises(RuntimeError, match="same device|on the cpu"):
            bad()
    with pytest.raises(RuntimeError, match="numpy"):
        gpu.numpy()
    with pytest.raises(NotImplementedError):
        gpu.long() @ gpu.long().T
    assert_same(gpu + torch.tensor(1.0), cpu + 1)  # a GPU takes a scalar, and index tensors, from the host
    assert_same(gpu[at], cpu[at])
    assert torch.zeros_like(gpu).is_cuda and torch.ones(2, device="cuda").device.type == "cuda" and gpu.cpu().is_cpu
    assert torch.isnan(torch.empty(3, device="cuda").cpu()).all()


def test_every_wait_is_counted_once():
    x = torch.arange(4.0).to("cuda")
    for does in (lambda: bool((x > 0).all()), x.nonzero, x.cpu, x.tolist, x.unique, lambda: x[x > 1],
                 lambda: x.repeat_interleave(torch.ones_like(x).long()), lambda: torch.ones(3).to("cuda"),
                 lambda: torch.tensor([1.0], device="cuda"), lambda: x.cpu().numpy(), torch.cuda.synchronize):
        simcuda.events.clear()
        does()
        assert sum(simcuda.waits().values()) == 1, simcuda.events
    simcuda.events.clear()
    packing.send(torch.ones(3), "cuda"), x[x.long()], x.masked_fill(x > 1, 0), x.sum(), torch.zeros(2, device="cuda")
    assert not simcuda.waits(), simcuda.events


def test_a_replay_reads_memory_anew_and_numbers_as_they_were():
    x, y, n, scalar = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), 2, torch.tensor(1.0)

    def work():
        y.add_(x * n * scalar)
        return (y + 1).sum()

    graph, out = captured(work)
    assert_same(y, torch.zeros(3))  # nothing runs in a capture
    assert torch.isnan(out.cpu())
    n = scalar.fill_(5)
    graph.replay(), x.fill_(10.0), graph.replay()
    assert_same(y, torch.full((3,), 22.0))  # 1 * 2, then 10 * 2
    assert_same(out, torch.tensor(69.0))
    x = x * 100  # the old x, which the graph reads, is held by nothing else
    with pytest.raises(RuntimeError, match="freed"):
        graph.replay()


def test_a_capture_refuses_what_waits():
    y = torch.zeros(3, device="cuda")
    for bad in (lambda: y.sum().item(), y.cpu, y.nonzero, lambda: torch.ones(2).to("cuda"), lambda: y[y > 0],
                lambda: torch.tensor([1.0], device="cuda"), torch.cuda.synchronize):
        with pytest.raises(RuntimeError, match="capturing"):
            captured(bad)
    with pytest.raises(RuntimeError, match="non-default"):
        torch.cuda.CUDAGraph().capture_begin()


def wait_in_the_mask(monkeypatch):
    plain = NextTokens.as_mask
    monkeypatch.setattr(NextTokens, "as_mask", lambda self, hidden: plain(self, hidden) if hidden.any() else None)
    return "capturing"


def lengths_from_the_host(monkeypatch):
    monkeypatch.setattr(graphs, "send", lambda x, device: x)
    return "same device"


def input_that_is_freed(monkeypatch):
    plain = Graphs.capture

    def capture(self, forward, h, length):
        gone = length.clone()
        return plain(self, lambda h, _: forward(h, gone), h, length)

    monkeypatch.setattr(Graphs, "capture", capture)
    return "freed"


def input_that_no_step_writes(monkeypatch):
    plain = Graphs.capture

    def capture(self, forward, *given):
        graph, given, out = plain(self, forward, *given)
        self.kept = getattr(self, "kept", []) + [given]  # or it were the bug above
        return graph, [x.clone() for x in given], out

    monkeypatch.setattr(Graphs, "capture", capture)
    return None


def cache_that_moves(monkeypatch):
    plain = NextTokens.of_all.__func__

    def of_all(cls, cache, length, longest):
        site = plain(cls, cache, length, longest)
        cache.k = cache.k.clone()
        return site

    monkeypatch.setattr(NextTokens, "of_all", classmethod(of_all))
    return None


@pytest.mark.parametrize("plant", [wait_in_the_mask, lengths_from_the_host, input_that_is_freed,
                                   input_that_no_step_writes, cache_that_moves])
def test_a_bug_planted_in_the_graphs_is_seen(plant, monkeypatch):
    policy = on("cuda")
    policy.model.graphs = True
    want, word = expected("drawn, rows refilled"), plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=word):
        assert_same(responses_of(policy), want, 1e-5)


# -------------------------------------------------------------------------------------------- sampling and scoring

WAYS = {"drawn, rows refilled": {}, "drawn, all at once, compacted": dict(rows=None),
        "temperature 0, delta 1": dict(temperature=0, delta=1.0, rows=None), "prescribed 2": dict(depths=2, rows=None),
        "prescribed, mixed": dict(depths=MIXED, rows=6), "no eos": dict(eos_ids=[-1], rows=None)}


@cache
def expected(way: str) -> list[dict]:
    with _disable_current_modes():
        return responses_of(on("cpu"), **WAYS[way])


@pytest.mark.parametrize("way, slots", [(way, None) for way in WAYS] + [
    *((way, 4) for way in WAYS if way not in ("prescribed 2", "no eos")), ("drawn, rows refilled", 256)])
def test_generate(way, slots, monkeypatch):
    """Without graphs (slots None) bit for bit; with them rows are summed in other shapes."""
    policy = on("cuda")
    policy.model.graphs = slots is not None
    monkeypatch.setattr(Graphs, "SLOTS", slots)
    assert_same(responses_of(policy, **WAYS[way]), expected(way), 1e-5 if slots else 0.0)


def test_generate_by_the_other_kind_of_model():
    changes = dict(model_type="qwen2", tie_word_embeddings=False)
    assert_same(*both(lambda device: responses_of(on(device, **changes))))


def test_prefill():
    def filled(device):
        policy = on(device)
        cache = Cache(policy.model.config, 6, 12, E + 1, policy.model.lm_head.weight)
        sample.prefill(policy, [PROMPTS[0], PROMPTS[4]], cache, torch.tensor([[5, 0], [2, 3]]))
        return {name: getattr(cache, name) for name in ("k", "v", "length", "filled", "cos", "sin")}

    got, want = both(filled)
    assert_same(got, want)
    assert got["k"].is_cuda and want["k"][:, 5, :3].all()


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("recompute", [False, True])
def test_score_and_gradients(recompute, dtype, rtol, monkeypatch):
    """In bfloat16 a GPU takes its grouped-query attention. Tables come in pieces of 7 positions."""
    monkeypatch.setattr(chunks, "CHUNK", 61 * 7)
    monkeypatch.setattr(chunks, "CHUNK_CPU", 61 * 7)
    responses = some_responses(2)

    def scored(device):
        policy = on(device, dtype, tie_word_embeddings=recompute)
        policy.model.recompute = recompute
        batch = collate(responses, L, device)
        base_h, lens_h = base_pass(policy, batch)
        values = score(policy, batch, base_h)
        sum((v * torch.linspace(-1, 1, len(v)).to(device)).sum() for v in values[:3]).backward()
        return [base_h, *lens_h, distill.lens_kl(policy.model, base_h, lens_h), *values,
                {name: p.grad for name, p in policy.trained().items()}]

    assert_same(*both(scored), rtol)


# ------------------------------------------------------------------------------------------------------- training


def stage_1(policy, responses, step):
    return distill.train_step(policy, responses, step, FLAGS.kl_factor, FLAGS.seed, FLAGS.micro_batch)


def stage_2(policy, responses, step):
    parts, mean_kl, drift = rloo.score_responses(policy, responses, FLAGS.micro_batch)
    advantages = torch.linspace(-1, 1, len(responses), dtype=torch.double) - FLAGS.beta * mean_kl
    rloo.accumulate_gradient(policy, parts, advantages, FLAGS.beta, FLAGS.max_new_tokens,
                             len(responses))
    return {"kl": mean_kl.tolist(), "drift": drift.tolist()}


@pytest.mark.parametrize("stage, recompute", [(stage_1, True), (stage_2, False)])
def test_training_steps(stage, recompute, tmp_path):
    responses = some_responses()

    def trained(device):
        policy = on(device)
        policy.model.recompute = recompute
        (tmp_path / device).mkdir()
        run, optimizer, logged = runs.Run(tmp_path / device, FLAGS), optim.adamw(policy), []
        for step in range(2):
            logged += [stage(policy, responses, step), run.apply_gradients(optimizer, 1e-3)]
        return logged, dict(policy.trained())

    assert_same(*both(trained), 1e-5)


def test_held_out():
    for target in (distill.base_target, distill.student_target):
        assert_same(*both(lambda device, target=target: distill.held_out(on(device), some_responses(), 1.0, 0, 3,
                                                                         target=target)), 1e-5)


def test_save_and_load(tmp_path):
    policy = on("cuda")
    run, optimizer = runs.Run(tmp_path, FLAGS), optim.adamw(policy)
    stage_1(policy, some_responses(), 0)
    run.apply_gradients(optimizer, 1e-3)
    run.save(1, policy, optimizer)

    def loaded(device):
        again, restored, step = run.load(toy_model(num_hidden_layers=L).to(device))
        assert step == 1 and again.device.type == device
        assert_same(dict(again.trained()), dict(policy.trained()))
        assert_same(checkpoints.moments(again, restored), checkpoints.moments(policy, optimizer))
        checkpoints.merge(again)
        return dict(again.model.named_parameters())

    assert_same(*both(loaded), 1e-6)


def test_weights_are_loaded_onto_the_device():
    ours, theirs = (Transformer.from_pretrained(EMBEDDED, dtype=torch.bfloat16, device=d) for d in ("cuda", "cpu"))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight and ours.lm_head.weight.is_cuda
    assert_same(dict(ours.named_parameters()), dict(theirs.named_parameters()))


# ------------------------------------------------------------------------------------ how often the host must wait


def waits_of(function) -> int:
    simcuda.events.clear()
    function()
    return sum(simcuda.waits().values())


@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("depths, each_step", [(None, E + 1), (2, 1), (MIXED[:, :4], 1)])
def test_waits_of_decoding(depths, each_step, use_graphs, monkeypatch):
    """A step waits for each exit that is drawn, since the host plans from it who runs on, and for its results. A
    capture waits, too."""
    policy, steps, captures, end, capture = on("cuda"), [], [], Cache.end, Graphs.capture
    policy.model.graphs = use_graphs
    monkeypatch.setattr(Cache, "end", lambda self, h: steps.append(1) or end(self, h))
    monkeypatch.setattr(Graphs, "capture", lambda self, *given: captures.append(1) or capture(self, *given))
    waited = waits_of(lambda: responses_of(policy, depths=depths, max_new_tokens=4))
    assert waited == each_step * len(steps) + len(captures), simcuda.waits()
    assert len(captures) == (use_graphs and (2 if isinstance(depths, int) else E + 1))  # a segment is captured once


def test_waits_of_training(tmp_path):
    """Stage 1 waits for the depths that each pass draws; else a step waits for what it logs, once, and for the
    gradient's norm. Stage 2 waits for the two things that it scores."""
    policy, responses = on("cuda"), some_responses()
    run, optimizer, passes = runs.Run(tmp_path, FLAGS), optim.adamw(policy), 2
    assert len(responses) == 5 and FLAGS.micro_batch == 3
    for stage, budget in ((stage_1, passes + 1), (stage_2, 2)):
        assert waits_of(lambda stage=stage: stage(policy, responses, 0)) == budget, simcuda.waits()
        assert waits_of(lambda: run.apply_gradients(optimizer, 1e-3)) == 1, simcuda.waits()
    assert waits_of(lambda: distill.held_out(policy, responses, 1.0, 0, 3)) == passes * (2 * E + 1) + 2, simcuda.waits()
