"""Run folders: what is written there, how a run is stopped, killed and picked up again. And the models they are about.

README lists a run's files. config.json has all that is needed to run it again: the flags, the model's revision among
them, hashes of the problems and prompts, the versions of Python, of the libraries and of this repository. A checkpoint
is renamed into place when whole. Only a run with complete.json, which is written last, counts as complete. At 256 MB
completions.jsonl becomes completions-STEP.jsonl.

A training goes: Run.resume, with --resume, takes the flags of then; `begin` gives the policy, anew or from the last
checkpoint, and makes the folder or reopens it; Run.steps yields the steps, saves, and stops where it is asked to;
each step ends with Run.apply_gradients, the optimizer's, and Run.log; Run.complete ends the run.

Every random number of a step is derived from seed, step, response and position: a resumed run needs no generator state.
"""

import argparse
import fcntl
import hashlib
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from shlex import join, quote

import torch

import flags
import optim
import parallel
from checkpoints import (
    checkpoint,
    checkpoints,
    digest,
    fill,
    fingerprint,
    load_policy,
    moments,
    refuse_absent,
    save_policy,
    write_tensors,
)
from data import tasks
from data.grade import Grade
from data.hub import UserError, as_json, field, fsync, parse_object, read_json, read_text, write_json
from data.text import Tokenizer
from exits import Policy, Response
from model import Transformer
from sample import refuse_prompts

RUNS = Path("runs")
MAX_SKIPPED = 5  # steps in a row with a gradient that isn't finite before a run gives up
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED")  # CPU, driver, cuBLAS
ROTATE = 2**28  # bytes of completions.jsonl
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What --resume may change: the end, where things lie by now (a hash tells whether they are the same), and this machine.
FREE_ON_RESUME = ("steps", "model", "data", "device", "rows", "micro_batch", "recompute", "cuda_graphs", "shard",
                  "save_every", "keep", "trackio", "resume")
RATES = ("lr", "head_lr")  # --resume may change these, too; but a run that has lost its own can't go on


# ------------------------------------------------------------------------------------------------ starting, stopping


class Stopped(BaseException):
    """Ctrl-C, SIGTERM, or a terminal that was closed, where they may take effect."""

    def __init__(self, number: int):
        self.number = number


def on_signal(number: int, _) -> None:
    if number == signal.SIGHUP:  # kernel and shell may send one each, and to write to a closed terminal is an error
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        silence(Run.terminals)
    elif parallel.size() == 1:  # not under torchrun, which passes on a signal that each process already has
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once
    if not Run.in_steps:
        raise Stopped(number)
    Run.stop_signal = number
    told = "once more stops at once" if parallel.size() == 1 else "torchrun waits for 30 s (--shutdown-timeout)"
    if parallel.rank() == 0:
        with suppress(OSError):  # past sys.stderr, which the bar may be writing to: Python refuses to enter it twice
            os.write(2, f"\nstopping when this step is done and saved; {told}\n".encode())


def silence(streams) -> None:
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Outlasting:
    """A stream whose reader may go first, as tee does at Ctrl-C: the step at hand is saved all the same."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, what, *args):
        try:
            return what(*args)
        except BrokenPipeError:
            if not Run.in_steps:
                raise
            silence([self.stream])
            Run.stop_signal = Run.stop_signal or signal.SIGPIPE


def say(message: str) -> None:
    """To stderr, once for all ranks."""
    if parallel.rank() == 0:
        print(message, file=sys.stderr, flush=True)


def run_main(main) -> None:
    """Runs a script's main. A bad input ends in one line on stderr and exit code 2, an interrupt of a training in one
    that says how to go on; whatever else goes wrong is a fault of ours and shows its traceback."""
    Run.current, Run.lock, Run.stop_signal = None, None, 0
    Run.terminals = [stream for stream in (sys.stdout, sys.stderr) if stream and stream.isatty()]
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    before = {number: signal.signal(number, on_signal) for number in STOPPING
              if not (nohup and number == signal.SIGHUP)}
    stderr = sys.stderr
    sys.stderr = stderr and Outlasting(stderr)
    try:
        message, code = guarded(main)
        if message and parallel.first_to_end():
            print(message, file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody reads on
        silence((sys.stdout, sys.stderr))
        code = 1
    except Exception:
        if parallel.first_to_end():
            raise
        code = 1  # another rank's end, which that one has told
    finally:
        sys.stderr = stderr
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        sys.exit(code)


def guarded(main) -> tuple[str | None, int]:
    """A main's last words and its exit code. Raises BrokenPipeError where nobody hears them."""
    try:
        parallel.start()
        if parallel.size() > 1 and not hasattr(main, "shared"):
            raise UserError(f"{Path(sys.argv[0]).name} can't share its work among processes: run it without torchrun")
        main()
        parallel.end()
        if sys.stdout is not None:
            sys.stdout.flush()
        return None, 0
    except UserError as error:
        return f"error: {error}", 2
    except Stopped as stopped:
        on = f"; python {Path(sys.argv[0]).name} --resume {quote(str(Run.current))} goes on" if Run.current else ""
        return f"stopped{on}", 128 + stopped.number
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or Run.current  # neither, where a disk is full and no run is open
        told = error.strerror or str(error)
        return f"error: {UserError(f'{where}: {told}' if where else told)}", 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
                words in str(error) for words in OUT_OF_MEMORY):
            raise
        on = f"python {Path(sys.argv[0]).name} --resume {quote(str(Run.current))} with" if Run.current else "use"
        told = ". ".join(str(error).split(". ")[:2])  # by torch: how much was asked for, and on which device
        return (f"error: out of memory: {on} fewer --rows if it was sampling, --micro-batch 1 if it was training; "
                f"where that is too much, shorter responses (--max-new-tokens, in a new run) ({told:.200})"), 2


# ---------------------------------------------------------------------------------------------- models and prompts


def load_model(args) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer by the flags. Seeds torch, too, and sets the embedded model to one thread."""
    torch.manual_seed(args.seed)  # the start of adapters and heads
    if args.model == "embedded":  # its products are so small that threads mostly wait for each other
        torch.set_num_threads(1)
    where = flags.location(args.model)
    tokenizer = Tokenizer.from_pretrained(where, args.revision)
    if not args.thinking and not tokenizer.can_think:
        raise UserError(f"--no-thinking: the chat template of {args.model} has no thinking mode: leave the flag out")
    device = parallel.device(args.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # streams and graphs belong to the current one
    model = Transformer.from_pretrained(where, args.revision, getattr(torch, args.dtype),
                                        "cpu" if args.shard else device)  # from where share_out takes it
    model.graphs = args.cuda_graphs
    if max(tokenizer.size, 1 + max(tokenizer.eos_ids)) > model.config.vocab_size:
        raise UserError(f"{args.model}: its tokenizer has {tokenizer.size} ids and ends responses by "
                        f"{tokenizer.eos_ids[:4]}, but the model knows {model.config.vocab_size}: they don't belong "
                        f"together")
    return model, tokenizer


def share_out(policy: Policy, args) -> Policy:
    """With --shard, leaves every process a part of the base's blocks."""
    if args.shard:
        from fast.sharded import Shards
        policy.model.fingerprint = fingerprint(policy.model)  # later its values are in no one place
        Shards(policy, parallel.device(args.device))
    return policy


def describe(args, tokenizer: Tokenizer) -> str:
    """What a script says of itself when it starts."""
    thinking = f", thinking {'on' if args.thinking else 'off'}" if tokenizer.can_think else ""
    blind = torch.version.cuda and not torch.cuda.is_available()  # a driver older than torch wants, for one
    no_gpu = " (torch has CUDA, but finds no GPU)" if blind else ""
    return (f"{args.model}, {args.dtype} on {args.device}{no_gpu}: {args.task}{thinking}, at most "
            f"{args.max_new_tokens} new tokens")


def prompt_ids(problems, model: Transformer, tokenizer: Tokenizer, args) -> list[list[int]]:
    """The problems' prompts. Raises UserError for one that leaves no room for a response, or where processes differ."""
    if parallel.size() > 1 and len(set(parallel.all_gather([(problems_hash(problems), fingerprint(model))]))) > 1:
        raise UserError(f"the processes differ in --model {args.model} or in the problems of --task {args.task}: give "
                        f"all machines the same files, and a task of your own no order of chance")
    prompts = tasks.prompts(problems, tokenizer, args.thinking)
    refuse_prompts(prompts, model.config, args.max_new_tokens, [f"the prompt of problem {p.id}" for p in problems])
    return prompts


def text_of(response: Response, tokenizer: Tokenizer) -> str:
    """A sampled response's text, without the eos that ended it."""
    return tokenizer.decode(response.token_ids[:-1] if response.finished else response.token_ids)


def grade(problem, response: Response, tokenizer: Tokenizer) -> Grade:
    """The task's grade of a sampled response."""
    return problem.grade(text_of(response, tokenizer), response.finished, tokenizer.think_open(response.prompt_ids))


def warn_unfinished(share_finished: float, meaning: str, tokenizer: Tokenizer, args) -> None:
    if share_finished < 0.8:
        bar = "!" * 100
        shorter = ", or pass --no-thinking for shorter ones" if args.thinking and tokenizer.can_think else ""
        say(f"{bar}\n{1 - share_finished:.0%} of the responses are unfinished at --max-new-tokens "
            f"{args.max_new_tokens}: {meaning}.\nRaise it{shorter}.\n{bar}")


def warn_fewer(name: str, asked: int, found: int) -> None:
    if found < asked:
        say(f"{name} {asked}: the task has {found} problems here, and all of them are taken")


def warn_idle(name: str, count: int) -> None:
    if count < parallel.size():
        say(f"{name} {count}: {parallel.size() - count} of {parallel.size()} processes have nothing to do in a step")


# ----------------------------------------------------------------------------------------------------- run folders


class Run:
    """One run's folder: what is written there, and how it is picked up again."""

    current: Path | None = None  # the folder in which this process writes
    lock = None  # and the open file by which it holds that, or an evaluation's
    in_steps, stop_signal = False, 0  # whether steps are under way, and what asked to stop after this one
    terminals: list = []  # of its output streams

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args, self.skipped, self.skipped_in_a_row = folder, args, 0, 0
        self.curves = None  # trackio, if asked for

    @classmethod
    def resume(cls, args: argparse.Namespace, p: argparse.ArgumentParser, stage: str) -> "Run":
        """The run in args.resume, under the flags it was started with. Of those given again, --steps may move its end
        and --lr its rate, what only concerns this machine may change, and all else must be as it was."""
        folder = Path(args.resume)
        if run_of(folder) != folder:
            raise UserError(f"--resume {folder}: give {run_of(folder)}, which goes on from its newest checkpoint; to "
                            f"go back to an earlier one, delete those after it")
        config, where = read_config(folder), folder / "config.json"
        refuse_stage(config, folder, stage)
        before = flags.replay(config["args"], p, where)
        # All flags start as None, so what isn't None afterwards was given now.
        now = p.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(before))))
        given = {name: value for name, value in vars(now).items() if value is not None}
        was_lr = before.lr
        for name, value in given.items():
            was = getattr(before, name)
            moved = name in ("task", "init") and name_of_run(str(value)) == name_of_run(str(was))
            if name not in (*FREE_ON_RESUME, *RATES) and value != was and not moved:
                so = f"with {flags.typed(name, was)}" if was is not None else f"without --{flags.flag(name)}"
                raise UserError(f"--resume {folder}: it was started {so}, not with {flags.typed(name, value)}: leave "
                                f"the flag out, or start a new run")
            if name != "resume":
                setattr(before, name, value)
        if "lr" in given and "head_lr" not in given and was_lr and getattr(before, "head_lr", None):
            before.head_lr *= given["lr"] / was_lr  # as many times the adapters' as before
        done, planned = folder / "complete.json", field(config["args"], "steps", int, where)
        ended = any(int(path.name[-6:]) >= planned for path in checkpoints(folder))  # not gone back to an earlier one
        if done.exists() and ended and before.steps <= planned:
            raise UserError(f"{folder} is complete: there is nothing to resume, but --steps above {planned} "
                            f"extends it")
        run = cls(folder, before)
        parallel.from_rank_0(lambda: lock_folder(folder))
        Run.current = folder
        parallel.from_rank_0(run.start_curves)
        return run

    def reopen(self, stage: str, about: dict, step: int) -> None:
        """Takes up the folder again for the steps from `step` on, whose lines in the logs are dropped."""
        where = self.folder / "config.json"
        recorded = read_json(where)
        for name, value in recorded["args"].items():
            if value is None and name not in FREE_ON_RESUME and getattr(self.args, name) is not None:
                raise UserError(f"{where}: {name} is null, and every run records it: restore it, or start a new run")
        for name, what in (("problems", f"the problems of --task {self.args.task}"),
                           ("prompts", f"the prompts of --task {self.args.task}, by the model's chat template,"),
                           ("start", "the weights of the run that it starts from")):
            if name in about and field(recorded, name, str, where, default=about[name]) != about[name]:
                raise UserError(f"{self.folder}: {what} are not those that it was started with: restore them, or start "
                                f"a new run")
        for partial in self.folder.glob(".partial-" + "[0-9]" * 6):  # a checkpoint that a kill cut short
            shutil.rmtree(partial)
        # Before the new --steps: a kill between leaves it resumable.
        (self.folder / "complete.json").unlink(missing_ok=True)
        kept = {name: recorded[name] for name in ("start", "commit", "judge", "resumed_commit", "resumed_judge")
                if name in recorded}
        for name, now in (("commit", commit()), ("judge", about["judge"])):
            if now != kept.get(f"resumed_{name}", kept.get(name, now)):  # from here on it is other code
                kept[f"resumed_{name}"] = now
                if name == "judge":  # as where it had failed on a response
                    say(f"the file of --task {self.args.task} has changed: its grade() and reward() count from here on")
        self.write_config(stage, {**about, **kept})
        self.rewind(step)

    def start_curves(self) -> None:
        if self.args.trackio:
            try:
                import trackio
            except ImportError:
                raise UserError("--trackio: it is not installed: python -m pip install trackio") from None
            trackio.init(project=self.args.trackio, name=self.folder.name, config=vars(self.args), resume="allow",
                         embed=False)
            self.curves = trackio

    def write_config(self, stage: str, about: dict) -> None:
        write_json(self.folder / "config.json", {
            "stage": stage, "args": vars(self.args), "commit": commit(), **about,
            "versions": {"python": platform.python_version()} | {
                name: version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")}})

    def steps(self, start: int, policy: Policy, optimizer) -> Iterator[int]:
        """The steps that are left, under self.bar. A checkpoint follows where it is due, and where a first signal
        asked to stop."""
        last = self.args.steps
        with parallel.bar(iterable=range(start, last), initial=start, total=last, desc="steps") as self.bar:
            try:
                Run.in_steps = True
                for step in self.bar:
                    yield step
                    stop = max(parallel.all_gather([Run.stop_signal]))  # whichever has it: all end after the same step
                    if (step + 1) % self.args.save_every == 0 or step + 1 == last or stop:
                        self.save(step + 1, policy, optimizer)
                        stop = max(parallel.all_gather([Run.stop_signal]))  # and none before it is saved
                    if stop:
                        raise Stopped(stop)
            finally:
                Run.in_steps = False

    def log(self, name: str, records: list[dict]) -> None:
        if parallel.rank():
            return
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(map(as_json, records))
        if self.curves and name == "metrics.jsonl":
            for record in records:
                self.curves.log(record, step=record["step"])

    def last_metrics(self, count: int = 1) -> list[dict]:
        """The last lines of metrics.jsonl, null where a number was not finite."""
        path = self.folder / "metrics.jsonl"
        rows = [parse_object(line, path) for line in read_text(path).splitlines()[-count:]]
        if not rows:
            raise UserError(f"{path} has lost its lines: --steps above {self.args.steps} goes on without them")
        return rows

    def rewind(self, step: int) -> None:
        """Drops what the logs hold of steps that are about to be run again, and of a line that a kill cut short."""
        for path in sorted(self.folder.glob("completions-" + "[0-9]" * 6 + ".jsonl"), reverse=True):
            if int(path.stem[-6:]) > step:  # gone back behind a full one, which is the open one again
                os.replace(path, self.folder / "completions.jsonl")
        for path in (self.folder / "metrics.jsonl", self.folder / "completions.jsonl"):
            if not path.exists():
                continue
            with open(path, "r+b") as file:
                keep = 0
                for number, line in enumerate(file, start=1):
                    found = re.match(rb'\{"step": (\d{1,7})[,}]', line)
                    if line.endswith(b"\n") and not found:
                        raise UserError(f"{path}:{number}: not a line of a run's log: repair or remove it")
                    if not found or not line.endswith(b"\n") or int(found[1]) >= step:
                        break
                    keep += len(line)
                file.truncate(keep)

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint after `step` steps; a kill at any moment leaves the previous one in force."""
        if parallel.rank():
            return
        partial = self.folder / f".partial-{step:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_policy(policy, partial)
        write_tensors(moments(policy, optimizer), partial / "optimizer.safetensors")
        write_json(partial / "state.json", {"step": step, "skipped": self.skipped,
                                            "skipped_in_a_row": self.skipped_in_a_row})
        completions = self.folder / "completions.jsonl"
        for log in (self.folder / "metrics.jsonl", completions):
            if log.exists():
                fsync(log)  # no checkpoint without the lines of its steps
        final = self.folder / f"step-{step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        fsync(self.folder)
        for old in checkpoints(self.folder)[: -self.args.keep]:
            os.replace(old, partial)  # so that a kill leaves no half of a checkpoint under a whole one's name
            shutil.rmtree(partial)
        if completions.exists() and completions.stat().st_size > ROTATE:
            os.replace(completions, self.folder / f"completions-{step:06d}.jsonl")

    def load(self, model: Transformer) -> tuple[Policy, torch.optim.Optimizer, int]:
        folder = checkpoint(self.folder)
        where = folder / "state.json"
        state, policy = read_json(where), share_out(load_policy(model, folder), self.args)
        self.skipped, self.skipped_in_a_row = (field(state, name, int, where, 0, 10**7, default=0)
                                               for name in ("skipped", "skipped_in_a_row"))
        optimizer = optim.adamw(policy)
        fill(moments(policy, optimizer), folder / "optimizer.safetensors")
        return policy, optimizer, field(state, "step", int, where, 0, 10**7)

    def apply_gradients(self, optimizer, lr: float, head_lr: float | None = None) -> dict:
        """optim.take_step, whose steps that were dropped are counted: a few in a row end the run. Returns what is
        logged."""
        head_lr = lr if head_lr is None else head_lr
        norm = optim.take_step(optimizer, lr, head_lr)
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            say(f"\na step is skipped: its gradient is not finite ({self.skipped} so far)")
        if self.skipped_in_a_row == MAX_SKIPPED:
            saved = checkpoints(self.folder)
            raise UserError(f"{MAX_SKIPPED} gradients in a row were not finite: start a new run with --dtype float32 "
                            "or a lower --lr" + (f", or --resume {self.folder} with a lower --lr" if saved else ""))
        return {"grad_norm": norm, "lr": lr, "head_lr": head_lr, "skipped": self.skipped}

    def complete(self, summary: dict) -> None:
        if parallel.rank():
            return
        write_json(self.folder / "complete.json", summary)
        if self.curves:
            self.curves.finish()


def finite(rows: list[dict], name: str, where) -> list[float]:
    """A number of each line of metrics.jsonl, but for those that were not finite, of which null stands there."""
    return [x for row in rows if (x := field(row, name, float, where, default=None)) is not None]


def lock_folder(folder: Path) -> None:
    """Holds a folder while this process lives."""
    Run.lock = open(folder / ".lock", "a+", encoding="utf-8", errors="replace")
    try:
        fcntl.lockf(Run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        Run.lock.seek(0)
        raise UserError(f"{folder} is in use by {Run.lock.read(200).strip() or 'another process'}: wait for it, or "
                        f"choose another folder") from None
    except OSError:
        pass  # a file system without locks
    Run.lock.truncate(0)
    Run.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    Run.lock.flush()


def problems_hash(problems, judge: bool = True) -> str:
    """Changes where the task's data has changed since a run began or, with `judge`, the file of its own grade() or
    reward()."""
    return json_hash([[p.question, p.gold, p.choices, *([] if p.program else [p.instruction]),
                       *([p.own_hash] if judge and p.own_hash else [])] for p in problems])


def json_hash(value) -> str:
    return hashlib.sha256(as_json(value).encode()).hexdigest()[:16]


def command(*script: str) -> str:
    """What was typed; `script` is how Python was given it."""
    return join(["python", *script, *sys.argv[1:]])


def commit() -> str | None:
    """This repository's commit, "-dirty" where files differ from it; None where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def begin(run: Run | None, stage: str, args, model: Transformer, problems, prompts, fresh, init: Path | None = None):
    """The run with its policy, optimizer and next step: where a resumed one stopped, else a new one, whose policy is
    fresh(). `init` is the run that stage 2 started from."""
    model.recompute = args.recompute
    about = {"problems": problems_hash(problems, judge=False), "prompts": json_hash(prompts),
             "judge": problems[0].own_hash}
    if run and checkpoints(run.folder):
        policy, optimizer, start = run.load(model)
        before = read_json(run.folder / "config.json")
        if init and str(init.resolve()) != before["args"].get("init"):
            # Elsewhere by now: the same, if it has those weights still. At its own path it may have trained on, and
            # have dropped them, which nobody reads here.
            found = [digest(folder) for folder in (init, *checkpoints(init)) if (folder / "exit_config.json").exists()]
            if found and before.get("start") not in (None, *found):
                about["start"] = found[-1]  # which reopen() refuses
    else:
        policy, start = share_out(fresh(), args), 0
        optimizer = optim.adamw(policy)
        if init:
            about["start"] = digest(checkpoint(init))
    if start > args.steps:
        raise UserError(f"--steps {args.steps}: {run.folder} has run {start} already")
    parallel.broadcast(policy.trained().values())  # they differ where GPUs do, or --init got a checkpoint meanwhile
    if run:
        parallel.from_rank_0(lambda: run.reopen(stage, about, start))
    else:
        args.revision = model.revision
        run = Run(parallel.from_rank_0(lambda: new_folder(stage, args.out)), args)
        Run.current = run.folder
        parallel.from_rank_0(lambda: (run.start_curves(), run.write_config(stage, about)))
    return run, policy, optimizer, start


def new_folder(stage: str, out: str | None) -> Path:
    """A new run's folder, which this process holds from now on."""
    folder = Path(out) if out else free_folder(stage)
    make_folder(folder)
    # A run that was refused or killed before it did anything leaves these, and may be started again.
    if any(p.name not in ("config.json", ".lock", ".partial-config.json") for p in folder.iterdir()):
        ours = (folder / "metrics.jsonl").exists() or (folder / "teacher.jsonl").exists()
        raise UserError(f"{folder} exists and is not empty: choose another --out"
                        + (f", or --resume {folder}" if ours else ""))
    lock_folder(folder)
    return folder


def make_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose a folder")
    out.mkdir(parents=True, exist_ok=True)


def free_folder(what: str) -> Path:
    """A new folder under runs/; another run may have started in the same second."""
    RUNS.mkdir(exist_ok=True)
    name = f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            pass
    raise UserError(f"{RUNS}/{name} and 998 more exist: name the run by --out")


def read_config(run: Path) -> dict:
    """What a run, or the run of a checkpoint, RUN/step-000120, was started with: stage, args, versions."""
    where = run_of(run) / "config.json"
    refuse_absent(run_of(run))
    if not where.exists():
        raise UserError(f"{run}: not the folder of a run, for it has no config.json; give one that distill.py or "
                        f"rloo.py wrote")
    config = read_json(where)
    if config.get("stage") not in ("distill", "rloo") or not isinstance(config.get("args"), dict):
        raise UserError(f"{run} is not a run of distill.py or rloo.py: give the folder that one of them wrote")
    return config


def inherit(args: argparse.Namespace, run: Path, task: bool = True) -> None:
    """flags.inherit, from a run's or a checkpoint's config.json."""
    flags.inherit(args, read_config(run), run_of(run) / "config.json", task)


def run_of(folder: str | Path) -> Path:
    """The run that a checkpoint belongs to, or the run itself."""
    folder = Path(folder)
    return folder.parent if re.fullmatch(r"step-\d{6}", folder.name) else folder


def name_of_run(folder: str | Path) -> Path:
    """Its name, or RUN/step-000120: what stays where folders are moved."""
    return Path(folder).relative_to(run_of(folder).parent)


def incomplete(run: Path) -> str:
    """What to say beside the name of a run that is not complete, or nothing."""
    found = checkpoints(run)
    return f" (unfinished, {found[-1].name})" if found and not (run / "complete.json").exists() else ""


def find(run: str, beside: Path) -> Path:
    """A run, or a checkpoint of one, by its recorded path, or, where folders were moved, by its name beside the run
    that recorded it."""
    moved = beside.parent / name_of_run(run)
    return next((folder for folder in (Path(run), moved) if folder.is_dir()), Path(run))


def short(run: Path, among: list[Path]) -> str:
    """A run's name, or, where another one has it, too, its path."""
    name, *names = (Path(os.path.abspath(folder)).name for folder in (run, *among))  # "." has none
    return name if names.count(name) == 1 else str(run)


def refuse_stage(config: dict, folder, stage: str) -> None:
    if config["stage"] != stage:
        raise UserError(f"{folder} is a run of {config['stage']}.py, not of {stage}.py; to go on with it: python "
                        f"{config['stage']}.py --resume {folder}")


def all_runs(stages: tuple[str, ...], model: str | None) -> Iterator[Path]:
    """The runs of runs/* that are of one of the stages and, if given, of that model, by the name that runs record."""
    for where in RUNS.glob("*/config.json"):
        try:
            config = read_config(where.parent)
        except UserError:
            continue  # another version's, or damaged: not the one to go on from
        if config["stage"] in stages and model in (None, config["args"].get("model")):
            yield where.parent


def newest(*stages: str, model: str | None) -> Path | None:
    """The complete run that ended last, of one of the stages and, if given, of that model."""
    found = [(done.stat().st_mtime, run) for run in all_runs(stages, model) if (done := run / "complete.json").exists()]
    return max(found)[1] if found else None


def begun_after(run: Path, stage: str, model: str | None) -> Path | None:
    """A run of a stage, and of a model if given, that was started when `run` was complete, and is not."""
    ended = (run / "complete.json").stat().st_mtime
    return next((other for other in all_runs((stage,), model) if not (other / "complete.json").exists()
                 and (other / "config.json").stat().st_mtime > ended), None)
