"""What the benchmarks share: a model to measure, interleaved timing, bare matrix products, memory."""

import argparse
import itertools
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import flags  # noqa: E402
from data.hub import UserError, write_json  # noqa: E402
from exits import PROJECTIONS, Policy, exit_depths  # noqa: E402
from fast.linear import linear  # noqa: E402
from model import Config, Transformer  # noqa: E402

SHAPES = {
    "qwen3-4b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
        tie_word_embeddings=True, attention_bias=False, max_position_embeddings=40960),
    "r1-distill-1.5b": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e4,
        tie_word_embeddings=False, attention_bias=True, max_position_embeddings=131072),
    "smollm2-135m": dict(
        model_type="qwen2", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5,
        tie_word_embeddings=True, attention_bias=True, max_position_embeddings=8192),
}


def parser(doc: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="checkpoint folder; it is also measured in transformers, where installed")
    p.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="random weights (default: smollm2-135m)")
    p.add_argument("--layers", type=flags.whole(2), help="of --shape: only so many (default: all)")
    p.add_argument("--exit-every", type=flags.whole(1), help="layers between exits")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    p.add_argument("--cuda-graphs", action="store_true", help="decode by CUDA graphs")
    p.add_argument("--threads", type=flags.whole(1), help="CPU threads (default: torch's)")
    p.add_argument("--repeats", type=flags.whole(1), default=5, help="interleaved; the median counts (default: 5)")
    p.add_argument("--out", help="JSON file for the figures")
    return p


def settle(args) -> None:
    if args.cuda_graphs and not args.device.startswith("cuda"):
        raise UserError(f"--cuda-graphs with --device {args.device}: only CUDA has them; leave the flag out")
    flags.check_out_file(args.out)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def random_model(shape: str, layers: int | None, dtype: torch.dtype, device: str) -> Transformer:
    sizes = SHAPES[shape]
    with torch.device("meta"):
        model = Transformer(Config(**sizes | {"num_hidden_layers": layers or sizes["num_hidden_layers"]})).to(dtype)
    model.to_empty(device=device)
    if sizes["tie_word_embeddings"]:
        model.lm_head.weight = model.model.embed_tokens.weight
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim == 2 else torch.nn.init.ones_(p)
    return model.eval()


def load(args) -> Policy:
    settle(args)
    dtype = getattr(torch, args.dtype)
    if args.model:
        model = Transformer.from_pretrained(args.model, dtype=dtype, device=args.device)
    else:
        model = random_model(args.shape, args.layers, dtype, args.device)
    model.graphs = args.cuda_graphs
    return Policy(model, exit_depths(model.config.num_hidden_layers, args.exit_every))


def peer(args):
    """The same checkpoint in transformers, or None with the reason."""
    if not args.model:
        return None, "no --model folder"
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None, "transformers is not installed"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), local_files_only=True)
    return model.to(args.device).eval(), f"transformers {version('transformers')}"


def interleaved(arms: dict, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each arm, a function, in `repeats` rounds of all of them, after one that isn't counted."""
    # What other jobs do to a single thread shows in its wall time: its CPU time is the steadier figure.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = {name: [] for name in arms}
    for number, (name, run) in itertools.product(range(repeats + 1), arms.items()):
        synchronise(device)
        start = clock()
        run()
        synchronise(device)
        if number:
            seconds[name].append(clock() - start)
    return seconds


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def layer_weights(block) -> list[torch.Tensor]:
    return [part.weight for name, part in block.named_modules() if name.endswith(PROJECTIONS)]


def bare_layers(model: Transformer, rows: int, ours: bool):
    """All the matrix products of every layer on `rows` streams, and nothing else; by F.linear or our `linear`."""
    product = linear if ours else F.linear
    weights = [w for block in model.model.layers for w in layer_weights(block)]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}

    @torch.no_grad()
    def run():
        for w in weights:
            product(inputs[w.shape[1]], w)

    return run


def bare_head(model: Transformer, rows: int, ours: bool):
    product, w = linear if ours else F.linear, model.lm_head.weight
    x = torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device)
    return torch.no_grad()(lambda: product(x, w))


def bandwidth(device: str) -> float:
    """Bytes per second of one pass that reads 1 GiB, the best of five."""
    big = torch.ones(2**28, device=device)
    return 2**30 / min(interleaved({"read": big.sum}, 5, device)["read"])


def peak_gib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def machine(args) -> str:
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "CPU"
    if not args.device.startswith("cuda") and Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                     if line.startswith("model name")), name)
        name += f", {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, {args.dtype}"


def report(args, record: dict) -> None:
    record = {"args": vars(args), "machine": machine(args), "peak_gib": peak_gib(args.device)} | record
    print(f"peak memory {record['peak_gib']:.2f} GiB")
    if args.out:
        write_json(Path(args.out), record)
        print(f"wrote {args.out}")
