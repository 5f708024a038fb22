"""Kills runs by SIGKILL, resumes them, and compares what comes out, byte for byte, with a run that was let alone.

    python tests/kill.py                          both stages: at every file operation, and at 40 random moments each
    python tests/kill.py --every 7 --random 3     fewer: every seventh operation

A file operation is a call that changes a disk: opening for writing, a write cut off in its middle, replace, mkdir,
unlink, fsync, truncate, a tensor file. A third of the resumed runs is killed once more.
"""

import argparse
import builtins
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoints import checkpoints
from tests.commands import forked, lines, run, toy_checkpoint

STAGE_1 = ("distill.py", "--model", "toy", "--task", "arithmetic", "--responses", 5, "--held-out", 2, "--steps", 4,
           "--save-every", 2, "--max-new-tokens", 6, "--responses-per-step", 3, "--micro-batch", 4)
STAGE_2 = ("rloo.py", "--init", "one", "--samples", 2, "--prompts-per-step", 2, "--problems", 9, "--steps", 4,
           "--save-every", 1, "--micro-batch", 4)


@dataclass
class Hook:
    """Runs before a command, in its process: writes each file operation to `trace`, or kills at the one numbered `at`.
    """

    trace: str | None = None
    at: int = -1

    def __call__(self) -> None:
        import checkpoints
        self.count = 0
        for name in ("replace", "rename", "mkdir", "unlink", "rmdir", "fsync"):
            self.patch(os, name)
        self.patch(builtins, "open", written=lambda path, mode="r", *_, **__: set(mode) & set("wax+"))
        self.patch(checkpoints, "save_file", written=lambda *_, **__: True)

    def patch(self, module, name: str, written=None) -> None:
        call = getattr(module, name)

        def hooked(*args, **kwargs):
            if written is None:
                self.operation(f"{name} {args[0]}")
                return call(*args, **kwargs)
            if not written(*args, **kwargs):
                return call(*args, **kwargs)
            self.operation(f"{name} {args[0] if name == 'open' else args[1]}")
            value = call(*args, **kwargs)
            if name == "open":
                return Cut(value, self)
            if self.operation(f"half of {args[1]}", kill=False):
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
                self.die()
            return value

        setattr(module, name, hooked)

    def operation(self, what: str, kill: bool = True) -> bool:
        self.count += 1
        if self.trace:
            handle = os.open(self.trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, f"{what}\n".encode())
            os.close(handle)
        if self.count == self.at and kill:
            self.die()
        return self.count == self.at

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Cut:
    """A file whose writes may be cut off in their middle."""

    def __init__(self, file, hook: Hook):
        self.file, self.hook = file, hook

    def write(self, text):
        if self.hook.operation(f"half a write to {self.file.name}", kill=False):
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            self.hook.die()
        return self.file.write(text)

    def writelines(self, texts):
        for text in texts:
            self.write(text)

    def truncate(self, size):
        self.hook.operation(f"truncate {self.file.name}")
        return self.file.truncate(size)

    def __iter__(self):
        return iter(self.file)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)


def finish(command, out: str, home: Path, kill_again: int = -1) -> None:
    """Brings a killed run to its end, as a user would: by --resume, or by the same command where nothing is there."""
    for before in (Hook(at=kill_again), None) if kill_again > 0 else (None,):
        again = (command[0], "--resume", out) if (home / out / "config.json").exists() else (*command, "--out", out)
        if (home / out / "complete.json").exists():
            return
        done = run(*again, cwd=home, ok=None, before=before)
        assert done.returncode == 0 or before and done.returncode == -signal.SIGKILL, done.stderr


def differences(whole: Path, broken: Path) -> list[str]:
    """What of a run's result isn't as it was without a kill."""
    def timeless(rows):
        return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]

    found = [str(path) for path in broken.rglob(".partial*")]
    for path in sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.name != ".lock"):
        one, other = whole / path, broken / path
        if not other.exists():
            found.append(f"{path} is missing")
        elif path.name == "config.json":
            continue
        elif path.suffix == ".jsonl":
            if timeless(lines(one)) != timeless(lines(other)):
                found.append(f"{path} differs")
        elif path.name != "complete.json" and one.read_bytes() != other.read_bytes():
            found.append(f"{path} differs")
    return found


def prepare(home: Path) -> dict[str, tuple]:
    """Unbroken runs of both stages in `home`: name of the run -> its command."""
    toy_checkpoint(home / "toy")
    commands = {"one": STAGE_1, "two": STAGE_2}
    for name, command in commands.items():
        run(*command, "--out", name, cwd=home, before=Hook(trace=str(home / f"{name}.trace")))
    return commands


def broken_at(command, whole: str, home: Path, at: int, kill_again: int = -1) -> list[str]:
    """What differs after a kill at a file operation."""
    out = f"{whole}-{at}"
    done = run(*command, "--out", out, cwd=home, ok=None, before=Hook(at=at))
    assert done.returncode == -signal.SIGKILL, done.stderr
    files = {p.name for p in checkpoints(home / whole)[-1].iterdir()}
    found = [f"{c.name} is not whole" for c in checkpoints(home / out) if {p.name for p in c.iterdir()} != files]
    finish(command, out, home, kill_again)
    found += differences(home / whole, home / out)
    shutil.rmtree(home / out)
    return found


def broken_after(command, whole: str, home: Path, seconds: float) -> list[str]:
    """What differs after a kill at some moment."""
    out = f"{whole}-moment"
    process = forked((*command, "--out", out), home, home / "log")
    time.sleep(seconds)
    process.kill()
    process.join()
    finish(command, out, home)
    found = differences(home / whole, home / out)
    shutil.rmtree(home / out)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--every", type=int, default=1, help="kill at every n-th file operation (default: 1)")
    p.add_argument("--random", type=int, default=40, help="kills at random moments, a stage (default: 40)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng, failed, count = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name, command in prepare(home).items():
            operations = (home / f"{name}.trace").read_text().splitlines()
            start = time.perf_counter()
            run(*command, "--out", "timed", cwd=home)
            length = time.perf_counter() - start
            shutil.rmtree(home / "timed")
            trials = [(f"operation {at}, {what}", broken_at, at, rng.randrange(1, 60) if rng.random() < 1 / 3 else -1)
                      for at, what in enumerate(operations, start=1)][:: args.every]
            trials += [("a random moment", broken_after, rng.uniform(0, length)) for _ in range(args.random)]
            for what, trial, *where in trials:
                count += 1
                try:
                    found = trial(command, name, home, *where)
                except AssertionError as error:
                    found = [str(error)]
                if found:
                    failed += 1
                    print(f"{command[0]}, killed at {what} ({where}): {'; '.join(found)}", flush=True)
            print(f"{command[0]}: {len(operations)} file operations, {len(trials)} kills", flush=True)
    print(f"{count} kills, {failed} that left something else than the unbroken run")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
