"""The commands as a user types them, on toy checkpoints: each in a process of its own, forked from one that has torch
imported already, for importing takes longer than most commands."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.toys import toy_model

ROOT = Path(__file__).parent.parent
SCRIPTS = ("distill", "rloo", "evaluate")
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "<|im_start|>assistant\n"
            "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}")
SMALL = ("--task", "arithmetic", "--responses", 6, "--held-out", 3, "--max-new-tokens", 12, "--micro-batch", 8,
         "--steps", 2)  # stage 1
RL = ("--samples", 2, "--prompts-per-step", 2, "--problems", 20, "--micro-batch", 3, "--steps", 2)  # stage 2


def toy_checkpoint(folder, layers=4, seed=0):
    """A random Qwen3 with a byte-level tokenizer. Half of the ids end a response, so that responses are short."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(100, 260)), "top_k": 20}))
    model = toy_model(seed, vocab_size=263, num_hidden_layers=layers, max_position_embeddings=4096)
    (folder / "config.json").write_text(json.dumps(vars(model.config)))
    save_file({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return folder


def fresh(*command, cwd, **env):
    """A command in a new interpreter, for what is settled when a library is imported."""
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def forked(command, cwd, log, before=None) -> multiprocessing.Process:
    """Starts a command; its output goes to the file log + ".out" and ".err". `before()` runs first, in its process."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([*SCRIPTS, "torch._dynamo"])  # which a first step imports: 1.5 s
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # what the server is to import
    process = forks.Process(target=_child, args=(list(map(str, command)), str(cwd), str(log), before))
    process.start()
    os.environ.pop("PYTHONPATH") if inherited is None else os.environ.update(PYTHONPATH=inherited)
    return process


def _child(command, cwd, log, before):
    import importlib

    import torch
    from tqdm import tqdm

    import runs
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would outlive a kill
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    os.chdir(cwd)
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = command
    if before is not None:
        before()
    runs.run_main(importlib.import_module(command[0].removesuffix(".py")).main)


@contextmanager
def running(*command, cwd, before=None):
    """A command in the background, which is killed in the end; its output is in cwd/log.out and cwd/log.err."""
    process = forked(command, cwd, Path(cwd) / "log", before)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run(*command, cwd, ok=True, before=None):
    """A command to its end: .returncode (negative: killed by that signal), .stdout, .stderr."""
    log = Path(cwd) / f".log-{os.getpid()}"
    process = forked(command, cwd, log, before)
    process.join()
    out, err = (Path(f"{log}{suffix}").read_text("utf-8") for suffix in (".out", ".err"))
    for suffix in (".out", ".err"):
        Path(f"{log}{suffix}").unlink()
    done = subprocess.CompletedProcess(command, process.exitcode, out, err)
    assert ok is None or (done.returncode == 0) == ok, out + err
    return done


def config(folder, **changes) -> dict:
    """A run's recorded flags, after changes to them."""
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    whole["args"] |= changes
    path.write_text(json.dumps(whole))
    return whole["args"]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
