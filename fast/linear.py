"""The matrix product: oneDNN's for float32 on a CPU where it is the faster one, F.linear for all else.

PyTorch multiplies float32 matrices on a CPU by MKL, and also ships oneDNN. Which is faster depends on the machine
(bench/products.py measures it, bench/LOG.md keeps the results):
    AMD with AVX-512    oneDNN, 1.5 to 2.9 times. That the AMD measured first had AVX-512 is inferred from its speed,
                        and so is the reason: MKL keeps its AVX-512 code for Intel
    others              MKL, but for a few rows on a matrix as large as the vocabulary's (an AMD without, an Intel)
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
SMALL = 2**18  # multiplications up to which oneDNN's larger cost of a call is not worth it
LARGE = 2**24  # numbers of a matrix from which oneDNN was faster on an AMD and an Intel, at ROWS
ROWS = range(2, 128)


def prefers_onednn(cpuinfo: str) -> bool:
    """Read off the CPU and not timed: a timing may come out otherwise when a killed run is resumed, and the same
    machine must go on with the same bits."""
    return "AuthenticAMD" in cpuinfo and "avx512f" in cpuinfo


CPUINFO = Path("/proc/cpuinfo")
ALWAYS = CPUINFO.exists() and prefers_onednn(CPUINFO.read_text("utf-8", "replace"))


def onednn_is_faster(rows: int, weight: torch.Tensor) -> bool:
    return rows * weight.numel() >= SMALL and (ALWAYS or (weight.numel() >= LARGE and rows in ROWS))


class OneDNN(torch.autograd.Function):
    """x W^T + b, differentiable: the operator itself has no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return ONEDNN(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:  # of matrices that needn't be transposed, MKL's packing is as good
            grad_x = ONEDNN(grad, weight.t(), None, "none", [], "") if ALWAYS else grad @ weight
        grad = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ x.flatten(0, -2)
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b: (..., D_in) -> (..., D_out), by the faster of two kernels for the same numbers."""
    if (ONEDNN is None or x.device.type != "cpu" or x.dtype != torch.float32
            or not onednn_is_faster(x.numel() // x.shape[-1], weight)
            or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")):  # these two know F.linear only
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return OneDNN.apply(x, weight, bias)
    return ONEDNN(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
