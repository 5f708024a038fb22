"""A simulated CUDA device on a CPU: what a GPU would refuse is refused, what the host would wait for is counted.

A tensor on the device is a `Sim`, a wrapper around a CPU tensor. To C++ it lives on 'lazy:0', a device type that
nothing else uses and whose autograd runs in the calling thread; to Python it says 'cuda:0'. One dispatch mode sees
every aten op with its real arguments, autograd's and the optimizer's included: it checks devices, counts waits by the
line that caused them, runs the op on the CPU tensors and, in a capture, records it. Not simulated: speed, memory, the
order of streams, memory that graphs of a pool share, CUDA's kernels and rounding, torch.compile, several GPUs.
`install` can't be undone, so it needs a process of its own.
"""

import ctypes
import os
import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch._dynamo  # now: it dislikes what `install` puts in place  # noqa: F401
import torch.nn.functional as F
from torch.nn.utils import clip_grad
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).resolve().parent.parent)
LAZY, CUDA, CPU = torch.device("lazy:0"), torch.device("cuda:0"), torch.device("cpu")
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}  # these take index tensors from the host
SCALARS = INDEX | {"masked_fill", "masked_fill_", "fill_", "where"}  # and these a 0-dim value, as pointwise ops do
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
         "bincount", "equal", "repeat_interleave", "histc"}  # the host needs a value, or the size of the result
FLOATS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "addmv", "dot"}  # for which cuBLAS has no integers
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
events = Counter()  # (kind, project line) -> how often; (no wait) in the kind of what the host goes on after
capture = None  # the graph that is being captured
pins = Counter()  # storage -> references to it that captured graphs hold here, and would not hold on a GPU
plain_attention = F.scaled_dot_product_attention


def site() -> str:
    """The innermost line of the project on the stack."""
    frame = sys._getframe(1)
    while frame and (not frame.f_code.co_filename.startswith(ROOT + os.sep) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}" if frame else "outside the project"


def sync(kind: str, waits: bool = True) -> None:
    """Counts what the host waits for (or, not `waits`, an asynchronous copy); no capture allows either."""
    if capture is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind}, {site()})")
    events[kind if waits else f"{kind} (no wait)", site()] += 1


def waits() -> Counter:
    """How often the host has waited, by project line."""
    lines = Counter()
    for (kind, line), n in events.items():
        lines[line] += n * ("no wait" not in kind)
    return +lines


def on_device(device) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "lazy")


class Sim(torch.Tensor):
    """A tensor on the simulated device; `inner` is the CPU tensor that stands for its memory."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                   storage_offset=inner.storage_offset(), device=LAZY)
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: dispatch(func, args, kwargs or {}))
    device, is_cuda, is_cpu = property(lambda s: CUDA), property(lambda s: True), property(lambda s: False)
    get_device, data_ptr = lambda s: 0, lambda s: s.inner.data_ptr()
    untyped_storage, tolist = lambda s: s.inner.untyped_storage(), lambda s: s.cpu().tolist()
    cuda, __repr__ = lambda s, *a, **k: s, lambda s, **k: f"Sim({s.inner})"

    def to(self, *args, **kwargs):  # C++ would take 'cuda' and 'lazy' for two devices, and copy
        def lazy(x):
            return LAZY if isinstance(x, (str, torch.device)) and on_device(x) else x
        return super().to(*map(lazy, args), **{k: lazy(v) for k, v in kwargs.items()})


def flat(x):
    """The tensors in an op's arguments or results."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from flat(y)


def each(function, x):
    """The same arguments or results with function(tensor) for every tensor."""
    if isinstance(x, torch.Tensor):
        return function(x)
    return type(x)(each(function, y) for y in x) if type(x) in (list, tuple) else x


@cache
def facts(func) -> tuple[str, list[int], bool]:
    """An op's name, which of its arguments it writes, and whether it mixes in scalars of the host's."""
    name = func._schema.name.partition("::")[2]
    writes = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    pointwise = torch.Tag.pointwise in func.tags or name.startswith(("_foreach", "_fused"))
    return name, writes, pointwise or name in SCALARS


def dispatch(func, args, kwargs):
    """One aten op, as a GPU would take it."""
    device, tensors = kwargs.get("device"), [*flat(args), *flat(tuple(kwargs.values()))]
    mine = [t for t in tensors if isinstance(t, Sim)]
    name, writes, free = facts(func)
    written = [args[i] for i in writes if i < len(args)]
    here = device is None or on_device(device)  # whether the result is the device's
    if name in ("_to_copy", "copy_"):
        copies = name == "copy_"
        source, blocks = args[copies], not (kwargs.get("non_blocking") or (copies and args[2:] == (True,)))
        here = isinstance(args[0], Sim) if copies else here
        if here != isinstance(source, Sim):
            sync("copy to device" if here else "copy to host", blocks or not here)  # to pageable memory it waits anyway
    else:
        check(func, name, free, args, kwargs, [t for t in tensors if not isinstance(t, Sim)], mine, written)

    def unwrap(t):
        return t.inner if isinstance(t, Sim) else t if capture is None else capture.bake(t)

    wrappers = {id(t.inner): t for t in mine}
    args = each(unwrap, args)
    kwargs = {k: CPU if k == "device" and v is not None else each(unwrap, v) for k, v in kwargs.items()}
    if capture is not None and written:  # recorded, but nothing is written before a replay
        out = each(lambda t: t.inner, written[0]) if func._schema.returns else None
    else:
        out = func(*args, **kwargs)
        if here and name in EMPTY:
            spoil(out)
    if capture is not None and not func.is_view:
        capture.ops.append((func, args, kwargs, None if written else out))
    return each(lambda t: wrappers[id(t)] if id(t) in wrappers else Sim(t) if here else t, out)


def check(func, name, free, args, kwargs, others, mine, written) -> None:
    """Raises where a GPU finds its arguments on two devices; counts what it cannot do without the host."""
    masks = []
    if name in INDEX:
        indices = [t for t in args[1] if t is not None]
        if not isinstance(args[0], Sim) and any(isinstance(t, Sim) for t in indices):
            raise RuntimeError(f"indices should be on the cpu or on the device of the indexed tensor ({site()})")
        for t in indices:
            None if isinstance(t, Sim) else sync("index to device")
        others = [t for t in others if not any(t is x for x in indices)]
        if name == "index" or len(indices) > 1 or args[2].numel() > 1:  # else it becomes masked_fill
            masks = [t for t in indices if t.dtype in (torch.bool, torch.uint8)]
    for t in others:
        if mine and (t.ndim or not free or any(t is x for x in written) or t.device.type != "cpu"):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                               f"and {t.device}! ({func}, {site()})")
    if name in FLOATS and not mine[0].is_floating_point():
        raise NotImplementedError(f'"addmm_cuda" not implemented for {mine[0].dtype} ({site()})')
    if masks or (name in WAITS and kwargs.get("output_size") is None):
        sync("boolean index" if masks else {"_local_scalar_dense": "item"}.get(name, name))


def spoil(out) -> None:
    """Fills fresh memory with what no code may rely on."""
    for t in flat(out):
        if t.is_floating_point() or t.dtype in (torch.int32, torch.int64):
            t.fill_(torch.nan if t.is_floating_point() else -7777777)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention by the CPU's own fused op and its gradient, after the checks that CUDA makes."""
    given = [t for t in (q, k, v, attn_mask) if t is not None]
    if len({t.device for t in given}) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device ({site()})")
    if not q.is_cuda:
        return plain_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if len({t.dtype for t in given}) > 1 or (is_causal and attn_mask is not None):
        raise RuntimeError(f"attention needs one dtype, and a mask or is_causal: {[t.dtype for t in given]} ({site()})")
    if q.shape[-3] != k.shape[-3]:
        if not enable_gqa or q.shape[-3] % k.shape[-3]:
            raise RuntimeError(f"{q.shape[-3]} heads of queries, {k.shape[-3]} of keys ({site()})")
        k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for x in (k, v))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class Mode(TorchDispatchMode):
    _should_skip_dynamo = classmethod(lambda cls: False)  # a wrapper that costs as much as an op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if Sim in types or on_device(kwargs.get("device")):
            return dispatch(func, args, kwargs)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # ordinary memory here
        return func(*args, **kwargs)


class CUDAGraph:
    """Records ops with the memory they read and write, and runs them again on just that. What was made inside is its
    own; the rest may be freed behind its back, and a replay then raises."""

    def __init__(self, keep_graph: bool = False):
        self.ops, self.baked, self.outside, self.ready = [], [], [], False

    def bake(self, t):  # a scalar of the host's enters with its value of now
        self.baked.append(t.clone())
        return self.baked[-1]

    def capture_begin(self, pool=None, capture_error_mode="global", check_input_liveness=False):
        global capture
        if streams[-1] is streams[0]:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if capture is not None or self.ready:
            raise RuntimeError("a capture is under way, or this graph holds one")
        capture = self

    def capture_end(self):
        global capture
        capture, self.ready = None, True
        made = [*(t for *_, out in self.ops for t in flat(out)), *self.baked]
        inside, aliases = {t.untyped_storage()._cdata for t in made}, {}

        def own(t):  # memory from outside: by an alias, so that its references can be told from all others
            if t.untyped_storage()._cdata in inside:
                return t
            if id(t) not in aliases:
                aliases[id(t)] = t.detach(), t
                pins[t.untyped_storage()._cdata] += 1
            return aliases[id(t)][0]

        self.ops = [(func, each(own, args), {k: each(own, v) for k, v in kwargs.items()}, out)
                    for func, args, kwargs, out in self.ops]
        self.outside = [alias for alias, _ in aliases.values()]
        for *_, out in self.ops:
            spoil(out)  # nothing has run yet

    def replay(self):
        for t in self.outside:
            storage = t.untyped_storage()
            if torch._C._storage_Use_Count(storage._cdata) - 1 <= pins[storage._cdata]:
                raise RuntimeError(f"replay reads memory freed since the capture: {tuple(t.shape)} ({site()})")
        for func, args, kwargs, out in self.ops:
            for old, new in zip(flat(out), flat(func(*args, **kwargs)), strict=False):
                old.copy_(new)

    def reset(self):
        pins.subtract(t.untyped_storage()._cdata for t in self.outside)
        self.__init__()

    __del__ = reset


class Stream:
    device = CUDA
    __init__ = wait_stream = lambda self, *args, **kwargs: None
    synchronize = lambda self: sync("synchronize")  # noqa: E731


streams = [Stream()]


@contextmanager
def use(stream):
    streams.append(stream or streams[-1])
    try:
        yield
    finally:
        streams.pop()


def install() -> None:
    """From here on this process has a GPU with 1 GiB free."""
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, lazy = 1, 17  # of c10::DeviceType
    guards[cuda] = guards[lazy]  # which counts no devices: the next line then puts a guard that does nothing there
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then copies where the mode sees it
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to keeps tied parameters tied
    nothing, zero, yes = lambda *a, **k: None, lambda *a, **k: 0, lambda *a: True
    for names, value in (
            ("_initialized", True), ("is_available is_initialized is_bf16_supported", yes), ("device_count", lambda: 1),
            ("_lazy_init _lazy_call manual_seed manual_seed_all empty_cache set_device set_rng_state set_rng_state_all "
             "reset_peak_memory_stats", nothing), ("Stream", Stream), ("stream StreamContext", use),
            ("current_device _exchange_device _maybe_exchange_device memory_allocated memory_reserved "
             "max_memory_allocated", zero), ("get_rng_state", lambda *a: torch.get_rng_state()),
            ("mem_get_info", lambda *a: (2**30, 2**31)), ("get_device_name", lambda *a: "simulated device"),
            ("synchronize", lambda *a: sync("synchronize")), ("current_stream", lambda *a: streams[-1]),
            ("default_stream", lambda *a: streams[0]), ("CUDAGraph", CUDAGraph), ("graph_pool_handle", lambda: (0, 1)),
            ("is_current_stream_capturing", lambda: capture is not None)):
        for name in names.split():
            setattr(torch.cuda, name, value)
            if hasattr(torch.cuda.graphs, name):
                setattr(torch.cuda.graphs, name, value)
    torch._C._host_emptyCache = nothing
    F.scaled_dot_product_attention = attention
    devices = [*_foreach_utils._get_foreach_kernels_supported_devices(), "lazy"]
    for module in (_foreach_utils, optimizer, clip_grad):  # so that the fused ways of a GPU are taken
        getattr(module, "_foreach_supported_types", []).append(Sim)
        if hasattr(module, "_get_foreach_kernels_supported_devices"):
            module._get_foreach_kernels_supported_devices = lambda: devices
    Mode().__enter__()
