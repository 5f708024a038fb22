"""The command line of the scripts: flags with types and ranges, defaults by model, what a run passes on.

A flag's type is checked before anything is loaded, and a run's recorded flags go through the same parser again.
"""

import argparse
import filecmp
import math
import os
import re
import sys
from pathlib import Path

import torch

import parallel
from data import tasks
from data.hub import UserError, check_name, field, is_text

EMBEDDED = Path(__file__).parent / "data" / "tiny"
DTYPES = ("float32", "bfloat16")
# What a run is about: the next script takes it over.
INHERITED = {"model": str, "revision": str, "task": str, "data": str, "thinking": bool, "max_new_tokens": int}


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options)
        self.pairs = {}

    def pair(self, name: str, embedded, other, *, help: str, **options) -> None:
        """A flag whose default depends on the model: `embedded`, or `other` for any other; None: the script finds it
        out. It parses as None until `settle` fills it in. In `help` each {} becomes one of the two."""
        told = [("off", "on")[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
                for value in (embedded, other)]
        self.pairs[self.add_argument(name, help=help.format(*told), **options).dest] = embedded, other

    def parse_known_args(self, args=None, namespace=None):
        args = [re.sub("^(--[a-z-]+=)~(?=/)", lambda found: found[1] + os.path.expanduser("~"), arg)  # bash leaves it
                for arg in (sys.argv[1:] if args is None else args)]
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if value == "":  # as of a variable of the shell that was never set
                self.error(f"--{flag(name)} is empty: leave it out, or give it a value")
        return found, rest

    def error(self, message: str):
        raise UserError(f"{message} (--help explains the flags)")


def whole(low: int, high: int = 10**6):
    """A flag's type: a whole number in low..high."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text:.30} must be a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float, above: bool = False):
    """A flag's type: a finite number in low..high, or above low."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or above and value == low:
            raise argparse.ArgumentTypeError(f"{text:.30} must be a number {'above' if above else 'from'} {low:g} "
                                             f"{'and at most' if above else 'to'} {high:g}")
        return value

    return parse


def parser(doc: str, out: str, seed: str = "of problems, samples, adapters and heads") -> Parser:
    """The flags that the scripts share, those of study/ and bench/harness.py among them."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Where help gives two "
               "values, 'A / B', the flag's default is A for the embedded model and B for any other.")
    p.add_argument("--model", help="checkpoint folder or hub id (default: the embedded one; after stage 1, its model)")
    p.add_argument("--revision", help="branch, tag or commit of a hub model")
    p.pair("--task", "arithmetic", "gsm8k", help=f"{', '.join(tasks.TASKS)}, or a file of your own, .py or .jsonl "
           "(default: {} / {}; after stage 1, its task and --data, --thinking and --max-new-tokens)")
    p.add_argument("--data", help="local file or folder with the task's data (default: made here, or from the hub)")
    p.pair("--thinking", True, True, action=argparse.BooleanOptionalAction,
           help="the chat template's thinking mode (default: {})")
    p.pair("--max-new-tokens", 160, 2048, type=whole(1), help="{} / {}; longer responses are cut, and count as "
           "unfinished")
    p.pair("--rows", 256, None, type=whole(1), help="responses sampled at a time, {} / what fits in half of the free "
           "memory; each holds a K/V cache")
    p.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
                   help="decode by CUDA graphs: fewer launches, not yet measured (default: off)")
    p.add_argument("--shard", action=argparse.BooleanOptionalAction, default=False,
                   help="under torchrun: share the base's blocks out over the GPUs, for a model that does not fit one "
                   "(docs/scaling.md; default: off)")
    p.add_argument("--seed", type=whole(0, 10**9), default=0, help=f"{seed} (default: 0)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or cuda:N (default: cuda where there is one)")
    p.add_argument("--dtype", choices=DTYPES, help="of the base (default: what the run before had on such a device, "
                   "else bfloat16 on CUDA and float32 on a CPU, which is slower where it only emulates bfloat16)")
    p.add_argument("--out", help=out)
    return p


def micro_batch(p: Parser) -> None:
    p.pair("--micro-batch", 64, 1, type=whole(1), help="responses in one training or scoring pass, {} / {}: memory, "
           "not results")


def recompute(p: Parser) -> None:
    p.pair("--recompute", False, True, action=argparse.BooleanOptionalAction,
           help="activation checkpointing, {} / {}: far less memory, up to half more work in the update")


def training(doc: str, save_every: tuple[int, int]) -> Parser:
    """`parser`, and what every training has besides."""
    p = parser(doc, "the run's folder (default: runs/STAGE-TIME)")
    micro_batch(p)
    recompute(p)
    p.pair("--save-every", *save_every, type=whole(1), help="steps between checkpoints, {} / {}")
    p.add_argument("--keep", type=whole(1), default=2, help="checkpoints that stay, the newest (default: 2)")
    p.add_argument("--trackio", metavar="PROJECT", help="metrics also as live curves: trackio show --project PROJECT")
    p.add_argument("--resume", help="folder of an interrupted run, which goes on under its own flags; --steps moves "
                   "its end, and with that the rate, which falls to 0 there; --lr sets another")
    return p


def threshold(p: argparse.ArgumentParser) -> None:
    p.add_argument("--threshold", type=number(0, 1), help="stop wherever an exit's probability is above this, in place "
                   "of drawing (default: draw, as in training)")


def check_out_file(out: str | None) -> None:
    """For a script whose --out is a file that it writes at its end, which may be hours away."""
    if out and (Path(out).is_dir() or not Path(out).parent.is_dir()):
        raise UserError(f"--out {out}: must be a file to write, in a folder that is there")


def replay(saved: dict, p: argparse.ArgumentParser, where) -> argparse.Namespace:
    """A run's recorded flags, checked as if they were typed. Raises UserError for those of another version, too."""
    known = vars(p.parse_args([])).keys()
    if odd := sorted(known - saved.keys()) + sorted(saved.keys() - known):
        raise UserError(f"{where}: was started by another version ({odd[0]!r:.60} is not a flag of both): start a new "
                        f"run")
    argv = []
    for name, value in saved.items():
        if value is not None:
            if not isinstance(value, (int, float)) and not is_text(value):
                raise UserError(f"{where}: {name} = {value!r:.60}: must be a number or a text")
            argv.append(typed(name, value))
    try:
        return p.parse_args(argv)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def typed(name: str, value) -> str:
    """A flag with its value, as on a command line."""
    return f"--{'' if value else 'no-'}{flag(name)}" if isinstance(value, bool) else f"--{flag(name)}={value}"


def flag(name: str) -> str:
    return name.replace("_", "-")


def name_of(model: str | None) -> str:
    """What a run records as its model: 'embedded' for the embedded checkpoint wherever it lies, an absolute path for
    any other folder, else a hub id. So a run outlives a move of the clone."""
    if model in (None, "embedded"):
        return "embedded"
    check_name(model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    if (folder / "metrics.jsonl").exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"--model {model} is a run: name the model that it was trained on, or what evaluate.py --merge "
                        f"makes of it")
    # The same weights under another template or with other ends are another model.
    names = {p.name for place in (EMBEDDED, folder) for p in place.iterdir() if p.suffix in (".json", ".jinja")}
    same = filecmp.cmpfiles(EMBEDDED, folder, {"model.safetensors", *names}, shallow=False)[0]
    return "embedded" if len(same) == 1 + len(names) else str(folder.resolve())


def location(model: str) -> Path | str:
    """Folder or hub id of a model by the name that a run has recorded."""
    return EMBEDDED if model == "embedded" else model


def inherit(args: argparse.Namespace, config: dict, where, task: bool = True) -> None:
    """Fills flags left open with an earlier run's, so that what follows is about the same problems and model; its dtype
    only on a device of the same kind. Without `task`, for what reads no problems: their file may be gone."""
    before = {name: field(config["args"], name, kind, where, default=None) for name, kind in INHERITED.items()
              if task or name not in ("task", "data")}
    if task and args.task is not None and tasks.name_of(args.task) != before["task"]:
        before["data"] = None
    on, dtype = (field(config["args"], name, str, where, default=None) for name in ("device", "dtype"))
    if dtype not in (None, *DTYPES):
        raise UserError(f"{where}: dtype {dtype!r:.60}: must be one of {', '.join(DTYPES)}")
    if on and on.split(":")[0] == args.device.split(":")[0]:
        before["dtype"] = dtype
    for name, value in before.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def settle(p: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """Fills the flags left open with the default for the embedded model or any other, and refuses what can't run before
    anything is loaded."""
    if args.model is not None and Path(args.model).is_absolute() and not Path(args.model).is_dir():
        raise UserError(f"there is no folder {args.model}: give the model's new place, or a hub id, by --model")
    args.model = name_of(args.model)
    for name, pair in p.pairs.items():
        if getattr(args, name) is None:
            setattr(args, name, pair[args.model != "embedded"])
    args.task = tasks.name_of(args.task)
    args.data = args.data and os.path.abspath(Path(args.data).expanduser())  # a link keeps its name
    check_device(args)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def check_device(args) -> None:
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UserError(f"--device {args.device}: must be cpu, cuda or cuda:N")
    if parallel.size() > 1 and device.type == "cuda":
        if device.index is not None:
            raise UserError(f"--device {args.device}: every process takes a GPU of its own; use --device cuda")
        if parallel.ranks_here() > torch.cuda.device_count() > 0:
            raise UserError(f"{parallel.ranks_here()} processes here and {torch.cuda.device_count()} GPUs: lower "
                            f"torchrun's --nproc-per-node, or use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {args.device}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA "
                        f"devices here; use --device cpu, or install a CUDA build")
    # A resumed run has these where nobody typed them: there is nothing to leave out.
    if args.shard and (parallel.size() == 1 or args.cuda_graphs):
        raise UserError("--shard needs several processes, which torchrun starts, and no --cuda-graphs: give --no-shard")
    if args.cuda_graphs and device.type != "cuda":
        raise UserError(f"--cuda-graphs with --device {args.device}: only CUDA has them; give --no-cuda-graphs")
