"""What the study's commands share: runs that are trained once, answers that are sampled once, intervals, figures.

Under --runs lie the runs, as distill.py and rloo.py write them, and answers/, what each said to the held-out problems:

    s1                stage 1 at KL factor 4 (on other models than the embedded one at 1)
    kl-F              stage 1 at another factor, from s1's base responses
    rl-LAM-SEED       stage 2 from s1
    rl-LAM-gated      the same, with depth charged for right answers only (study.fronts)
    rl-LAM-SEED-kl-F  stage 2 from kl-F (study.fig2, study.fronts, study.baselines)
    full, full-SEED   s1 with exits that never open, and stage 2 from it (study.baselines)
    static-D          stage 1 for depth D alone, and rl-0-0-static-D stage 2 from it (study.baselines)
    …-TASK            the same on another task (study.crossdomain)

What is complete is not made again, what was begun goes on; so every command can be killed and repeated. Each writes
data/NAME.json, some a figure to figures/, and `python -m study.write` the text around them, results.md; all of it under
--out, by default beside the runs. What stands in docs/ was written with --out docs.
"""

import argparse
import copy
import gc
import math
import re
import shlex
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import torch
from tqdm import tqdm

import flags
import runs
from checkpoints import checkpoint, digest, fingerprint, load_policy
from data import tasks
from data.hub import UserError, as_json, field, read_json, read_lines, write_json, write_text
from data.text import Tokenizer
from evaluate import Z, graded, measure, paired
from exits import Policy, adapters_off
from model import Transformer
from sample import generate
from study.coherence import COLUMNS, each, pooled

ROOT = Path(__file__).parent.parent
# The record on the embedded model; other models take the scripts' own defaults. A smaller KL factor takes more steps of
# stage 1 to converge (docs/results.md).
RECORD_1 = "--exit-every 1 --rank 64 --responses 24000 --lr 0.0015 --held-out 200"
STEPS = {16: 3000, 2: 6000, 0: 12000}  # of stage 1 at KL factors of at least that
RECORD_2 = "--steps 150 --lr 0.0004 --save-every 30"
PASSED = ("model", "revision", "task", "data", "thinking", "max_new_tokens", "rows", "micro_batch", "recompute",
          "cuda_graphs", "device", "dtype")  # flags that go to the trainings


# ------------------------------------------------------------------------------------------------ flags and runs


def arguments(doc: str, more=None):
    """The flags of a command, settled, with its held-out problems; more(parser) adds its own."""
    p = flags.parser(doc, out="folder of data/ and figures/ (default: that of --runs)",
                     seed="of the held-out problems and their answers; the runs have seeds of their own")
    p.add_argument("--runs", default="runs/study", help="folder of the runs (default: runs/study)")
    p.add_argument("--train", action=argparse.BooleanOptionalAction, default=True, help="train the runs that are "
                   "missing (default: on); without, what needs them is left out")
    p.add_argument("--stage1", type=words, default=(), help="further flags of every distill.py, in one text: "
                   "--stage1=\"--rank 8\"")
    p.add_argument("--stage2", type=words, default=(), help="the same of every rloo.py")
    p.add_argument("--seeds", type=flags.whole(1), default=5, help="of stage 2 at lambda 0.1 (default: 5)")
    p.pair("--n", 600, 100, type=flags.whole(2), help="held-out problems, {} / {}")
    p.add_argument("--temperature", type=flags.number(0, 1e4), default=1.0, help="of the tokens (default: 1)")
    flags.micro_batch(p)
    flags.recompute(p)
    if more:
        more(p)
    args = p.parse_args()
    args.out = args.out or args.runs
    if run := getattr(args, "run", None):  # a command about one run takes from it what it was about
        runs.inherit(args, run)
    args.passed = {name: flags.typed(name, value) for name in PASSED if (value := getattr(args, name)) is not None}
    return with_problems(flags.settle(p, args))


def words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text:.60}: {error}") from None


def on_task(args, task: str):
    """The same settings on another task."""
    args = copy.copy(args)
    args.task, args.data = task, None
    args.passed = {name: text for name, text in args.passed.items() if name != "data"} | {"task": f"--task={task}"}
    return with_problems(args)


def with_problems(args):
    args.problems = tasks.load(args.task, "test", data=args.data, n=args.n, seed=args.seed)
    args.prompts_hash = None
    return args


def trained(args, name: str, script: str, *options) -> Path | None:
    """The folder of a complete run, trained now, or taken up again, if it has to be; None where --no-train forbids."""
    folder = Path(args.runs) / name
    if not (folder / "complete.json").exists():
        if not args.train:
            print(f"{folder} is not complete: left out", file=sys.stderr)
            return None
        free = [text for name, text in args.passed.items() if name in runs.FREE_ON_RESUME]  # fewer --rows, say
        begun = (["--resume", folder, *free] if (folder / "config.json").exists() else
                 [*args.passed.values(), *options, "--out", folder])
        command = [sys.executable, str(ROOT / script), *map(str, begun)]
        print(f"+ {shlex.join(command[1:])}", flush=True)
        if call(command):
            raise UserError(f"{folder} is not complete, for the reason above: this command, repeated, goes on with it")
    return folder


def call(command: list[str]) -> int:
    """A command's exit code. Stopped meanwhile, it waits until the command has saved what it has."""
    gc.collect()  # of the policies that have answered here
    torch.cuda.empty_cache()  # what this process keeps of a GPU's memory, the command would lack
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except runs.Stopped as stopped:
        if stopped.number == signal.SIGTERM:  # Ctrl-C in a terminal reaches both
            process.terminate()
        process.wait()
        raise


def about_the_same(args, folder: Path, **named) -> Path:
    """Refuses a run about another model or task than the study's, or one that is not what its name says. What --stage1
    and --stage2 would have set is not compared."""
    recorded = runs.read_config(folder)["args"]
    ours = {name: getattr(args, name) for name in ("model", "task", "data", "thinking", "max_new_tokens", "dtype")}
    for name, wanted in {**ours, **named}.items():
        if (here := recorded.get(name)) != wanted:
            raise UserError(f"{folder} has {name} {here!r:.80}, and this study {wanted!r:.80}: choose another --runs")
    return folder


def stage_one(args, suffix: str = "") -> Path | None:
    """s1, the run that stage 2 starts from, or its like on another task; by hand it may have been given another factor.
    """
    where, factor = Path(args.runs, "s1", "config.json"), 4 if args.model == "embedded" else 1
    if where.exists():
        factor = field(runs.read_config(where.parent)["args"], "kl_factor", float, where)
    return calibrated(args, f"s1{suffix}", factor)


def kl_run(args, factor: float) -> Path | None:
    """Stage 1 at a KL factor, s1 where it is s1's."""
    s1 = stage_one(args)
    if s1 is None or runs.read_config(s1)["args"]["kl_factor"] == factor:
        return s1
    return calibrated(args, f"kl-{factor:g}", factor, "--teacher", s1 / "teacher.jsonl")


def calibrated(args, name: str, factor: float, *options) -> Path | None:
    steps = next(steps for least, steps in STEPS.items() if factor >= least)
    record = (*RECORD_1.split(), "--steps", steps) if args.model == "embedded" else ()
    folder = trained(args, name, "distill.py", *record, *args.stage1, "--kl-factor", factor,
                     *options)  # last, since of a flag given twice the last one counts
    return folder and about_the_same(args, folder, kl_factor=factor)


def one_depth(args, depth: int) -> Path | None:
    """Stage 1 for one depth alone: at a KL factor of next to nothing every exit is safe, and all take the first."""
    s1 = stage_one(args)
    record = ("--steps", 3000) if args.model == "embedded" else ("--forward-kl",)  # else it never lets go (distill.py)
    return s1 and calibrated(args, f"static-{depth}", 1e-4, "--exit-every", depth, *record, "--teacher",
                             s1 / "teacher.jsonl")


def refuse_other_start(folder: Path, how: str, start: str | None, init: Path) -> None:
    """Raises UserError where a folder's recorded start, if it has one, is not what `init` is now."""
    if start not in (None, digest(checkpoint(init))):
        raise UserError(f"{folder} was {how} another {init.name} than the one there now: move it away, or choose "
                        f"another --runs")


def stage_two(args, name: str, lam: float, seed: int, init: Path | None, *options) -> Path | None:
    if init is None:
        return None
    begun = Path(args.runs, name)
    if (begun / "config.json").exists():
        refuse_other_start(begun, "trained from", runs.read_config(begun).get("start"), init)
    record = RECORD_2.split() if args.model == "embedded" else ()
    folder = trained(args, name, "rloo.py", *record, "--keep", 999, *args.stage2, "--init", init, "--lam",
                     lam, "--seed", seed, *options)
    return folder and about_the_same(args, folder, lam=lam, seed=seed)


def rl_run(args, lam: float = 0.1, seed: int = 0, suffix: str = "") -> Path | None:
    return stage_two(args, f"rl-{lam:g}-{seed}{suffix}", lam, seed, stage_one(args, suffix))


def over_seeds(args, make) -> list[Path]:
    """The runs make(seed) that there are."""
    return [folder for seed in range(args.seeds) if (folder := make(seed))]


def from_kappa(args, kappa: float | None) -> tuple[Path | None, list[Path]]:
    """Stage 1 at a KL factor (None: s1), and stage 2 from there over the seeds."""
    s1 = stage_one(args)
    start = kl_run(args, kappa) if s1 and kappa else s1
    suffix = "" if start == s1 else f"-kl-{kappa:g}"
    return start, over_seeds(args, lambda seed: stage_two(args, f"rl-0.1-{seed}{suffix}", 0.1, seed, start))


def lower_kappa(args) -> tuple[float, Path | None, list[Path]]:
    """A quarter of s1's KL factor, and what is made from it."""
    kappa = runs.read_config(stage_one(args))["args"]["kl_factor"] / 4
    return kappa, *from_kappa(args, kappa)


# --------------------------------------------------------------------------------------------- answers and metrics


class Answers(NamedTuple):
    rows: list[dict]  # one answer to each held-out problem: evaluate.py's completions without log-probabilities
    depth_of_outcome: list[int]  # the depths that were open to it, the last one all layers
    path: Path


def answers(args, source, how: str = "learned", rule=None, delta: float = 0.0) -> Answers:
    """Sampled once; later calls read the file, as long as its first line says the same.

    source is the folder of a run or checkpoint or, for the base's weights, a tuple of exits; rule(policy) may change
    how it exits and gives further arguments of sample.generate. `how` names the rule.
    """
    if args.prompts_hash is None:
        tokenizer = Tokenizer.from_pretrained(flags.location(args.model), args.revision)
        args.prompts_hash = runs.json_hash(tasks.prompts(args.problems, tokenizer, args.thinking))
    base = isinstance(source, tuple)
    folder = None if base else checkpoint(source)
    label = "base" if base else f"{folder.parent.name}-{folder.name}"
    head = {"weights": list(source) if base else digest(folder), "how": how, "n": args.n, "delta": delta,
            "temperature": args.temperature, "prompts": args.prompts_hash,
            "problems": runs.problems_hash(args.problems), "base": base_mark(args.model, args.revision),
            **{name: getattr(args, name) for name in (
                "model", "revision", "dtype", "thinking", "max_new_tokens", "seed")}}
    name = f"{label}.{how}.{Path(args.task).stem}.n{args.n}.t{args.temperature:g}.d{delta:g}.jsonl"
    path = Path(args.runs) / "answers" / re.sub("[ /]", "-", name)
    if path.exists():
        first, *rows = [row for _, row in read_lines(path)] or [{}]
        if {key: first.get(key) for key in head} == head:
            return Answers(rows, field(first, "outcomes", list, path), path)
    gc.collect()  # a rule's closure and its policy hold each other, and with that the last model
    model, tokenizer = runs.load_model(args)
    prompts = runs.prompt_ids(args.problems, model, tokenizer, args)
    policy = Policy(model, source or None) if base else load_policy(model, folder)
    with tqdm(total=len(prompts), desc=path.stem) as bar, adapters_off(policy, base):
        responses = generate(policy, prompts, max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids,
                             temperature=args.temperature, delta=delta, seed=(args.seed,), rows=args.rows, progress=bar,
                             **(rule(policy) if rule else {}))
    rows = [{key: value for key, value in row.items() if not key.startswith("logp_")}
            for row in graded(args.problems, responses, tokenizer)]
    depth_of_outcome = policy.depth_of_outcome.tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    coherence_file(path).unlink(missing_ok=True)  # of what stood there before
    write_text(path, "".join(map(as_json, [{**head, "outcomes": depth_of_outcome}, *rows])))
    return Answers(rows, depth_of_outcome, path)


def thresholded(p: float):
    """A rule: exits where a head's probability is above p, in place of drawing them."""
    return lambda policy: {"threshold": p}


def undrawn(args, run: Path) -> Answers:
    """A run's answers with exits where a head's probability is above 1/2: a setting of study.baselines' sweep, too."""
    return answers(args, run, "heads 0.5", thresholded(0.5))


@cache
def base_mark(model: str, revision: str | None) -> str:
    """Tells the base from another that has lain at the same place. In bfloat16, as the mark is: half of the memory."""
    return fingerprint(Transformer.from_pretrained(flags.location(model), revision, torch.bfloat16))


def base_answers(args) -> Answers:
    return answers(args, (), "full depth", lambda policy: {"depths": policy.n_layers})


def total(row: dict, layers: int) -> float:
    """sum_t l_t / L of one response."""
    return sum(row["depths"]) / layers


def point(args, answered, **about) -> dict:
    """A row of the tables: the README's metrics, and the differences from the base over the same problems, each with
    half of its 95% interval."""
    rows, depth_of_outcome, _ = answered
    base, L = base_answers(args).rows, depth_of_outcome[-1]
    metrics = {**about, **measure(rows, depth_of_outcome)}
    compute, tokens = metrics["average_compute"], sum(len(row["depths"]) for row in rows)
    spread = sum((total(row, L) - compute * len(row["depths"])) ** 2 for row in rows)  # of a ratio of sums
    metrics["average_compute_half"] = Z * math.sqrt(spread) / tokens
    for name, value in (("accuracy", lambda row: row["correct"]), ("length", lambda row: len(row["depths"])),
                        ("total_compute", lambda row: total(row, L))):
        gain, half = paired(map(value, base), map(value, rows), shares=name == "accuracy")
        metrics |= {f"{name}_change": gain, f"{name}_change_half": half}
    return metrics


def correct(answered) -> list[float]:
    return [float(row["correct"]) for row in answered.rows]


def mean_correct(answered: list) -> list[float]:
    """Of each problem, the share of the runs that solve it."""
    return [mean(values) for values in zip(*map(correct, answered), strict=True)]


def coherence_of(args, answered: Answers) -> dict:
    """The columns of study/coherence.py, for which the base model reads the answers; kept beside them."""
    path = coherence_file(answered.path)
    if not path.exists():
        write_json(path, pooled(each(Policy(runs.load_model(args)[0]), answered.rows, args.micro_batch)))
    found = read_json(path)
    return {name: found[name] for name in COLUMNS}


def coherence_file(path: Path) -> Path:
    return path.with_suffix(".coherence.json")


# ------------------------------------------------------------------------------------------------ data and figures


def save(args, name: str, command: str, **data) -> dict:
    """Writes data/NAME.json and returns what it holds."""
    path = Path(args.out) / "data" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"model": Path(args.model).name, "task": Path(args.task).name}
    before = read_json(path) if path.exists() else about
    if any(before.get(key) != value for key, value in about.items()):
        raise UserError(f"{path} is about {before.get('model')}, {before.get('task')}: give this study an --out of its "
                        f"own")
    found = {"command": runs.command("-m", f"study.{command}"), **about, "n": len(args.problems),
             "temperature": args.temperature,
             "problems": runs.problems_hash(args.problems), "commit": runs.commit(), **data}
    write_json(path, found)
    print(f"wrote {path}")
    return found


def figure(args, name: str, columns: int = 1, rows: int = 1, width: float = 7, height: float = 3.4):
    """(axes, finish): empty axes that share a plain style, and what writes them to figures/NAME.png."""
    import matplotlib  # slow
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2,
                         "lines.markersize": 4, "legend.frameon": False, "legend.fontsize": 8})
    drawing, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")

    def finish():
        path = Path(args.out) / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, dpi=140)
        plt.close(drawing)
        print(f"wrote {path}")

    return axes.flatten().tolist(), finish
