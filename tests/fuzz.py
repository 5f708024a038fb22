"""Mutates every file that is parsed, and reports what ends in a traceback, hangs, or passes on as NaN.

    python tests/fuzz.py --n 200                   200 mutations of every format, from seed 0
    python tests/fuzz.py --n 2000 --seed 1 --only config.json index

A mutation either loads or is refused by a UserError of one short line. What loads is used: a model computes, a
tokenizer renders, a run goes on; its numbers have to be finite.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import load_file, save_file

import distill
import rloo
import teacher
from checkpoints import load_policy
from data import tasks, text
from data.hub import UserError
from exits import Response, collate, score
from model import Transformer
from tests.commands import TEMPLATE, toy_checkpoint

SECONDS = 20  # for one mutation; more is a hang
GIGABYTES = 6  # of address space beyond what is in use when it starts
NASTY = [
    None, True, False, 0, 1, -1, 2, 3, 10**6, 10**18, 10**400, -(10**30), 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), "", "8", "x", "\0", "\ud800", "é" * 70, "../x", "/etc/passwd", "x" * 10_000, [], {}, [[]], [None],
    [-1], [10**9], [0.5], ["a", 1], {"": None}, {"content": 3}, list(range(500)), [[[[[[[[[[0]]]]]]]]]],
]
BYTES = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n\n", b"[" * 100_000, b'{"a":' * 5000, b"\x1b[31m", b"null", b"{}",
    b"[]", b"1e999", b"NaN", b'"', b"}",
]
HOSTILE = [
    "{{ 'a' * 10**7 }}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{% if %}", "{{", "{{ messages[99] }}", "{% include 'x' %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__ }}", "{{ 'x' | wordwrap(0) }}",
    "{{ raise_exception('\x1b[31m') }}", "{% break %}", "{{ " + "(" * 500 + ")" * 500 + " }}", "{{ '\\ud800' }}",
    "{{ range(10**9) | list }}", "{{ strftime_now(1) }}", "{{ strftime_now('%' * 10**6) }}",
]


# ------------------------------------------------------------------------------------------------------------ mutations


def places(value, path=()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [p for name, x in inside for p in places(x, (*path, name))]


def mutate_json(value, rng: random.Random):
    """A value of another kind or range, a field gone, renamed, doubled or wrapped, somewhere."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = rng.choice(places(value))
        if not path:
            value = copy.deepcopy(rng.choice(NASTY)) if rng.random() < 0.1 else value
            continue
        parent = value
        for name in path[:-1]:
            parent = parent[name]
        old, how = parent[path[-1]], rng.random()
        if how < 0.6:
            parent[path[-1]] = copy.deepcopy(rng.choice(NASTY))
        elif how < 0.7:
            parent[path[-1]] = [old] if rng.random() < 0.5 else {"x": old}
        elif how < 0.8:
            parent[path[-1]] = str(old) if not isinstance(old, str) else copy.deepcopy(rng.choice(NASTY))
        elif isinstance(parent, dict):
            del parent[path[-1]]
            if how < 0.9:
                parent[str(rng.choice(("x", "", path[-1] + "s")))] = old
        else:
            parent[path[-1]:path[-1] + 1] = [old, old] if how < 0.9 else []
    return value


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 3))):
        at, how = rng.randrange(len(raw) + 1), rng.random()
        if how < 0.2:
            raw = raw[:at]
        elif how < 0.4:
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        elif how < 0.7:
            raw = raw[:at] + rng.choice(BYTES) + raw[at:]
        elif how < 0.8:
            raw = rng.choice(BYTES)
        else:
            stop = rng.randrange(at, min(len(raw), at + 40) + 1)
            raw = raw[:at] + raw[stop:] if how < 0.9 else raw[:stop] + raw[at:]
    return raw


def mutate(path: Path, rng: random.Random) -> None:
    """Another content for a file: by its format mostly, by its bytes, or none at all."""
    raw, how = path.read_bytes(), rng.random()
    if how < 0.02:
        path.unlink()
        return path.mkdir() if how < 0.01 else None
    if how < 0.25:
        return path.write_bytes(mutate_bytes(raw, rng)) and None
    if path.suffix == ".json":
        path.write_text(json.dumps(mutate_json(json.loads(raw), rng)))
    elif path.suffix == ".jsonl":
        rows = raw.decode().splitlines()
        i = rng.randrange(len(rows))
        rows[i] = json.dumps(mutate_json(json.loads(rows[i]), rng))
        path.write_text("\n".join(rows) + "\n")
    elif path.suffix == ".safetensors":
        mutate_tensors(path, rng)
    elif path.suffix == ".jinja":
        path.write_text(mutate_template(raw.decode(), rng))
    else:
        path.write_bytes(mutate_bytes(raw, rng))


def mutate_tensors(path: Path, rng: random.Random) -> None:
    tensors = load_file(path)
    name, how = rng.choice(sorted(tensors)), rng.random()
    tensor = tensors.pop(name)
    if how < 0.3:
        tensors[name] = tensor.flatten().index_fill(0, torch.tensor(rng.randrange(tensor.numel())), rng.choice(
            (float("nan"), float("inf"), -float("inf")))).view(tensor.shape)
    elif how < 0.5:
        tensors[name] = tensor.to(rng.choice((torch.int8, torch.bool, torch.float16, torch.float8_e4m3fn, torch.int64)))
    elif how < 0.7:
        tensors[name] = rng.choice((tensor.flatten(), tensor[None], tensor.flatten()[:0].clone(), torch.zeros(())))
    elif how < 0.85:
        tensors[rng.choice(("", "x", name + ".weight", "\n"))] = tensor
    save_file(tensors, path)


def mutate_template(source: str, rng: random.Random) -> str:
    at = rng.choice([0, len(source), *(m.start() for m in re.finditer("{", source))])
    return source[:at] + rng.choice(HOSTILE) + source[at:]


# -------------------------------------------------------------------------------------------------------------- formats


class Bench:
    """A toy checkpoint, two runs on it and data files; each format is a file in here and what reads it."""

    def __init__(self, home: Path):
        self.home = home
        toy_checkpoint(home / "toy", layers=2)
        (home / "toy" / "chat_template.jinja").write_text(TEMPLATE)
        tensors = load_file(home / "toy" / "model.safetensors")
        shutil.copytree(home / "toy", home / "sharded")
        (home / "sharded" / "model.safetensors").unlink()
        shards = {f"model-{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
        for name, part in shards.items():
            save_file(part, home / "sharded" / name)
        (home / "sharded" / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {"total_size": 1}, "weight_map": {t: name for name, part in shards.items() for t in part}}))
        shutil.copytree(home / "toy", home / "templates")
        config = json.loads((home / "templates" / "tokenizer_config.json").read_text())
        config |= {"chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "x", "template": "x"}],
                   "bos_token": {"__type": "AddedToken", "content": "<|im_start|>"}, "add_bos_token": False}
        (home / "templates" / "tokenizer_config.json").write_text(json.dumps(config))
        (home / "templates" / "chat_template.jinja").unlink()
        self.command(distill, "--model", "toy", "--task", "arithmetic", "--responses", 3, "--held-out", 1, "--steps", 1,
                     "--max-new-tokens", 4, "--responses-per-step", 2, "--out", "one")
        self.command(rloo, "--init", "one", "--samples", 2, "--prompts-per-step", 1, "--problems", 3, "--steps", 1,
                     "--out", "two")
        (home / "two" / "complete.json").unlink()
        (home / "own.jsonl").write_text("".join(json.dumps(
            {"question": f"{i}?", "answer": "a", "choices": ["a", "b"], "instruction": "x"}) + "\n" for i in range(9)))
        (home / "gsm.jsonl").write_text("".join(json.dumps(
            {"question": f"{i}?", "answer": f"1+{i}=<<1+{i}={i + 1}>>\n#### {i + 1}"}) + "\n" for i in range(9)))
        (home / "tom.csv").write_text("story_structure,infilled_story,question,expected_answer\n" + "".join(
            f'"A moved {i}.","A ""moved"" {i},\nthen left.",Does A know? Answer yes or no.,yes\n' for i in range(9)))
        self.model = Transformer.from_pretrained(home / "toy")
        self.formats = {
            "config.json": ("toy/config.json", self.loads_model), "index": (
                "sharded/model.safetensors.index.json", lambda: self.loads_model("sharded")),
            "weights": ("toy/model.safetensors", self.loads_model),
            "generation_config.json": ("toy/generation_config.json", self.renders),
            "tokenizer_config.json": ("templates/tokenizer_config.json", lambda: self.renders("templates")),
            "tokenizer.json": ("toy/tokenizer.json", self.renders),
            "chat_template.jinja": ("toy/chat_template.jinja", self.renders),
            "exit_config.json": ("one/step-000001/exit_config.json", self.loads_policy),
            "adapter_config.json": ("one/step-000001/adapter_config.json", self.loads_policy),
            "adapter": ("one/step-000001/adapter_model.safetensors", self.loads_policy),
            "heads": ("one/step-000001/exit_heads.safetensors", self.loads_policy),
            "teacher.jsonl": ("one/teacher.jsonl", self.reads_responses),
            "run's config.json": ("two/config.json", self.resumes), "state.json": (
                "two/step-000001/state.json", self.resumes),
            "optimizer": ("two/step-000001/optimizer.safetensors", self.resumes),
            "metrics.jsonl": ("two/metrics.jsonl", self.resumes), "completions.jsonl": (
                "two/completions.jsonl", self.resumes),
            "stage 1's config.json": ("one/config.json", self.continues),
            "task.jsonl": ("own.jsonl", lambda: self.reads_task("own.jsonl")),
            "gsm8k.jsonl": ("gsm.jsonl", lambda: self.reads_task("gsm8k", "gsm.jsonl")),
            "tom.csv": ("tom.csv", lambda: self.reads_task("tom", "tom.csv")),
        }

    def command(self, script, *argv) -> None:
        before = sys.argv, os.getcwd()
        sys.argv = [script.__name__, *map(str, argv)]
        os.chdir(self.home)
        try:
            script.main()
        finally:
            sys.argv = before[0]
            os.chdir(before[1])

    def loads_model(self, name="toy") -> None:
        model = Transformer.from_pretrained(self.home / name)
        with torch.no_grad():
            finite(model(torch.tensor([[1, 2, 3]])))

    def renders(self, name="toy") -> None:
        tokenizer = text.Tokenizer.from_pretrained(self.home / name)
        ids = tokenizer.prompt_ids([{"role": "user", "content": "2 + 2 <|im_end|>?"}])
        tokenizer.decode(ids), tokenizer.pieces(ids), tokenizer.think_open(ids), tokenizer.can_think
        assert tokenizer.eos_ids and all(isinstance(i, int) and i >= 0 for i in tokenizer.eos_ids), tokenizer.eos_ids

    def loads_policy(self) -> None:
        policy = load_policy(self.model, self.home / "one")
        self.scores(policy, [Response([1, 2], [3, 4], [1, 2], [], [])])

    def scores(self, policy, responses) -> None:
        with torch.no_grad():
            for value in score(policy, collate(responses, policy.n_layers))[:2]:
                finite(value)

    def reads_responses(self) -> None:
        kept = teacher.read_responses(self.home / "one" / "teacher.jsonl", self.model, argparse.Namespace(
            model="toy", task="arithmetic", data=None, thinking=True, max_new_tokens=4))
        for responses in kept.values():
            if responses:
                self.scores(load_policy(self.model, self.home / "one"), responses)

    def resumes(self) -> None:
        self.command(rloo, "--resume", "two")

    def continues(self) -> None:
        self.command(rloo, "--init", "one", "--samples", 2, "--prompts-per-step", 1, "--problems", 2, "--steps", 1,
                     "--max-new-tokens", 2)

    def reads_task(self, task, data=None) -> None:
        task = str(self.home / task) if data is None else task
        for split in ("train", "test"):
            for problem in tasks.load(task, split, data=data and str(self.home / data)):
                problem.grade("ANSWER: a", True)


def finite(values: torch.Tensor) -> None:
    assert torch.isfinite(values).all(), "a number that is not finite"


# ------------------------------------------------------------------------------------------------------------- fuzzing


class Hang(BaseException):
    """Time is up; no Exception, which a template's errors are caught by."""


def attempt(work) -> str | None:
    """What is wrong with how work() ended, or None."""
    def late(*_):
        raise Hang

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            work()
    except UserError as error:
        said = str(error)
        return None if said.isprintable() and len(said) < 1500 else f"a refusal of {len(said)} characters: {said!r:.80}"
    except OSError:  # which run_main tells in one line
        return None
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error!s:.90} ({Path(last.filename).name}:{last.lineno})"
    finally:
        signal.alarm(0)
    return None


def fuzz(bench: Bench, name: str, n: int, seed: int) -> Counter:
    """How often each fault was found in n mutations of a format."""
    rng, faults = random.Random(f"{seed} {name}"), Counter()
    file, work = bench.formats[name]
    top = bench.home / Path(file).parts[0]
    kept = bench.home / ".kept"
    (shutil.copytree if top.is_dir() else shutil.copy)(top, kept)
    for _ in range(n):
        mutate(bench.home / file, rng)
        if fault := attempt(work):
            faults[fault] += 1
        shutil.rmtree(bench.home / "runs", ignore_errors=True)
        shutil.rmtree(top) if top.is_dir() else top.unlink(missing_ok=True)
        (shutil.copytree if kept.is_dir() else shutil.copy)(kept, top)
    shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    return faults


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=200, help="mutations of each format (default: 200)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="*", metavar="FORMAT", help="of these formats (default: all)")
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            bench = Bench(Path(folder))
        if Path("/proc/self/statm").exists():
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            most, hard = used + GIGABYTES * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        failed = 0
        for name in args.only or bench.formats:
            faults = fuzz(bench, name, args.n, args.seed)
            failed += faults.total()
            print(f"{name}: {args.n} mutations, {faults.total()} faults", flush=True)
            for fault, count in faults.most_common():
                print(f"    {count} x {fault}", flush=True)
    print(f"{failed} faults; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB of memory at most")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
