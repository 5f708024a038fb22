"""The matrix product: two kernels for one result, chosen by what the machine is."""

import pytest
import torch
import torch.nn.functional as F

from fast import linear
from tests.toys import assert_close

INTEL = "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f amx_bf16\n"
AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 "


def force(monkeypatch, onednn: bool, backward: bool = False) -> None:
    monkeypatch.setattr(linear, "onednn_is_faster", lambda rows, weight: onednn)
    monkeypatch.setattr(linear, "ALWAYS", backward)


@pytest.mark.skipif(linear.ONEDNN is None, reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_onednn_product_equals_the_frameworks_in_values_and_gradients(bias, backward, monkeypatch):
    """On many machines every result goes through it; a gradient missing or transposed would train something else."""
    generator, results = torch.Generator().manual_seed(0), []
    x, weight = torch.randn(3, 5, 7, generator=generator), torch.randn(11, 7, generator=generator)
    b = torch.randn(11, generator=generator) if bias else None
    factor = torch.randn(3, 5, 11, generator=generator)
    force(monkeypatch, True, backward)
    for product in (linear.linear, F.linear):
        for needs in ((True, True), (True, False), (False, True)):
            given = [x.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])]
            given += [b.clone().requires_grad_()] if bias else []
            y = product(*given)
            (factor * y).sum().backward()
            with torch.no_grad():
                results.append([y, product(*given), *(t.grad for t in given)])
    assert results[0][0].grad_fn.name().startswith("OneDNN")
    for ours, wanted in zip(results[:3], results[3:], strict=True):
        for a, c in zip(ours, wanted, strict=True):
            assert (a is None) == (c is None)
            if a is not None:
                assert_close(a, c, 1e-5)


def test_onednn_leaves_autocast_and_compilation_to_the_framework(monkeypatch):
    """The training script of the embedded model uses both; neither knows the operator."""
    force(monkeypatch, True)
    monkeypatch.setattr(linear, "ONEDNN", lambda *_: pytest.fail("called"))
    x, weight = torch.randn(3, 7), torch.randn(11, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert linear.linear(x, weight).dtype == torch.float32


@pytest.mark.parametrize(("cpuinfo", "onednn"), [
    (INTEL, False), (AMD + "avx512f\n", True), (AMD + "\n", False), ("CPU implementer\t: 0x41\n", False), ("", False)])
def test_kernel_is_read_off_the_machine_and_the_frameworks_where_in_doubt(cpuinfo, onednn):
    """A choice by timing could fall otherwise after a kill: the resumed run would leave the bits of the killed one."""
    assert linear.prefers_onednn(cpuinfo) == onednn


@pytest.mark.parametrize(("rows", "out", "always", "onednn"), [
    (1, 49_152, False, False), (16, 49_152, False, True), (96, 49_152, False, True), (512, 49_152, False, False),
    (16, 1_536, False, False), (16, 1_536, True, True), (1, 1_536, True, True), (1, 128, True, False)])
def test_choice_depends_on_rows_and_size_alone(rows, out, always, onednn, monkeypatch):
    """Sampling and scoring call it with the same sizes and must get the same kernel; figures are in bench/LOG.md."""
    monkeypatch.setattr(linear, "ALWAYS", always)
    assert linear.onednn_is_faster(rows, torch.empty(out, 576, device="meta")) == onednn
