"""What comes from outside: fields, flags, tensors, the operating system. Bad ones end in one line, and early."""

import contextlib
import importlib
import io
import json
import math
import os
import resource
import shutil
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import flags
import runs
from checkpoints import fingerprint, load_policy, save_policy
from data import hub
from data.hub import UserError, as_json, field, write_text
from exits import Policy
from model import Transformer
from tests import fuzz
from tests.commands import RL, ROOT, SMALL, config, run, toy_checkpoint
from tests.toys import edit, toy_model


def said(monkeypatch, capsys, *command) -> str:
    """The one line with which a command is refused."""
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as end:
        runs.run_main(importlib.import_module(command[0].removesuffix(".py")).main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and len(line) < 400
    return line


# fields

@pytest.mark.parametrize("kind, value", [
    (int, "8"), (int, 8.0), (int, True), (int, 9), (int, 0), (int, 10**400), (int, [8]), (float, "1"),
    (float, math.nan), (float, math.inf), (float, 10**400), (float, True), (bool, 1), (bool, "true"), (str, 1),
    (str, ["x"]), (str, "a\0b"), (str, "\ud800"), (dict, []),
    (list, 1), (list, [1, "2"]), (list, [1, 9]), (list, [True]), (list, [1.0]), (list, [[1]]),
])
def test_a_field_of_the_wrong_kind_or_range_is_named(kind, value):
    """Else it ends in a traceback somewhere else, or trains on nonsense."""
    with pytest.raises(UserError, match="file.json: size = .* must be "):
        field({"size": value}, "size", kind, "file.json", 1, 8)
    with pytest.raises(UserError, match="file.json: field 'size' is missing"):
        field({"size": None}, "size", kind, "file.json", 1, 8)


def test_a_field_of_the_right_kind_is_given_back():
    """Else a sound file is refused."""
    for kind, value in ((int, 8), (float, 1), (float, 1.5), (bool, False), (str, ""), (dict, {}), (list, [1, 8])):
        assert field({"size": value}, "size", kind, "file.json", 1, 8) == value
    assert field({}, "size", int, "file.json", 1, 8, default=5) == 5 and field({}, "x", int, "f", default=None) is None


def test_a_refusal_is_one_short_line_of_harmless_characters():
    """Else what it quotes paints the terminal, or fills it."""
    line = str(UserError("a\nb\x1b[2Jc\x07\u202e" + "x" * 10**6 + " the remedy"))
    assert line.isprintable() and len(line) < 1500 and line.startswith("a b [2Jc") and line.endswith("the remedy")


def test_what_is_written_is_json_and_there_or_not():
    """Else NaN, which other readers refuse, or half a file after a power cut."""
    assert json.loads(as_json({"a": [math.nan, (1, -math.inf)], "b": 0.1})) == {"a": [None, [1, None]], "b": 0.1}


def test_a_file_is_replaced_only_when_it_is_on_the_disk(tmp_path, monkeypatch):
    """Else a power cut leaves a name without its content, or an error half of it, or litter."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(hub.os, "fsync", lambda *args: (calls.append("fsync"), fsync(*args)))
    monkeypatch.setattr(hub.os, "replace", lambda *args: (calls.append("replace"), replace(*args)))
    write_text(tmp_path / "x", "text")
    assert calls == ["fsync", "replace", "fsync"] and (tmp_path / "x").read_text() == "text"
    monkeypatch.setattr(hub.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(tmp_path / "x", "another")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "text"


def test_mutated_files_are_refused_in_one_line(tmp_path):
    """Else a damaged file ends in a traceback or a hang. python tests/fuzz.py tries thousands."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        bench = fuzz.Bench(tmp_path)
    faults = {name: fuzz.fuzz(bench, name, 2, 1) for name in bench.formats}
    assert not any(faults.values()), faults


# models

@pytest.mark.parametrize("file", [
    "toy/model.safetensors", "policy/adapter_model.safetensors", "policy/exit_heads.safetensors"])
def test_nan_and_quantised_numbers_are_refused_at_load(tmp_path, file):
    """Else a broken file trains or answers in NaN, and completes."""
    folder = toy_checkpoint(tmp_path / "toy", layers=2)
    (tmp_path / "policy").mkdir()
    save_policy(Policy(Transformer.from_pretrained(folder), (1,), 2), tmp_path / "policy")
    tensors = load_file(tmp_path / file)
    name = max(tensors)
    for bad, naming in ((tensors[name].index_fill(-1, torch.tensor([0]), torch.nan), f"{name} holds NaN"),
                        (tensors[name].index_fill(-1, torch.tensor([0]), torch.inf), f"{name} holds NaN"),
                        (tensors[name].to(torch.int8), f"{name} is of type I8")):
        save_file(tensors | {name: bad}, tmp_path / file)
        with pytest.raises(UserError, match=naming):
            load_policy(Transformer.from_pretrained(folder), tmp_path / "policy")


def test_a_fingerprint_tells_weights_apart_and_not_dtypes_or_adapters(tmp_path):
    """Else a policy is put on another base, or refused on its own in bfloat16."""
    one, folder = toy_model(0), toy_checkpoint(tmp_path / "toy")
    before = fingerprint(one)
    assert before != fingerprint(toy_model(1)) and fingerprint(Policy(one, (2,)).model) == before
    assert fingerprint(Transformer.from_pretrained(folder)) == fingerprint(
        Transformer.from_pretrained(folder, dtype=torch.bfloat16))
    with torch.no_grad():
        one.model.layers[3].mlp.up_proj.weight.mul_(1.02)  # as merged adapters do
    assert fingerprint(one) != before


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, monkeypatch, capsys):
    """Else the first unusual word is an IndexError, or no response ever ends."""
    monkeypatch.chdir(tmp_path)
    folder = toy_checkpoint(tmp_path / "toy", layers=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 263]}')
    assert "they don't belong together" in said(monkeypatch, capsys, "distill.py", "--model", "toy", *SMALL)
    (folder / "generation_config.json").unlink()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["another", "and another", "one more", "last"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "they don't belong together" in said(monkeypatch, capsys, "distill.py", "--model", "toy", *SMALL)


# flags

FLAGS = {
    "rloo.py": ("--save-every 0", "--save-every -3", "--seed -1", f"--seed {'1' * 20}", "--lr -1", "--lr nan",
                "--lr 1e308", "--lam inf", "--lam -1", "--lam nan", "--beta -1", "--beta nan", "--samples 1",
                "--steps 0", "--steps 1.5", "--rows 0", "--micro-batch 0", "--max-new-tokens 0", "--problems 0",
                "--device nope", "--device meta", "--device cuda:99", "--dtype int8", "--task gsm",
                "--task none.jsonl", "--prompts-per-step -1"),
    "distill.py": ("--kl-factor nan", "--kl-factor 0", "--rank 0", "--held-out 0", "--responses x"),
    "evaluate.py": ("--temperature -1", "--temperature nan", "--delta inf", "--show -1", "--n 0"),
}


@pytest.mark.parametrize("script, flags", [(script, flag) for script, flags in FLAGS.items() for flag in flags])
def test_a_flag_out_of_range_is_named_before_anything_is_loaded(tmp_path, monkeypatch, capsys, script, flags):
    """Else --lr nan ends as a complete run, and others in a traceback after minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "load_model", lambda *_: pytest.fail("the model is loaded"))
    name, value = flags.split()
    init = ("--init", tmp_path / "one") if script == "rloo.py" else ()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text('{"stage": "distill", "args": {}}')
    runs_given = ("base",) if script == "evaluate.py" else ()
    assert name in said(monkeypatch, capsys, script, *runs_given, *init, f"{name}={value}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("device, dtype, wanted", [("cpu", "bfloat16", "bfloat16"), ("cuda:1", "bfloat16", "float32"),
                                                   ("cpu", None, "float32")])
def test_a_run_goes_on_in_the_dtype_it_began_in(device, dtype, wanted):
    """Else stage 2 leaves the float32 that stage 1 needed; or a CPU emulates what a GPU did."""
    p = flags.parser("", "")
    args = p.parse_args(["--device", "cpu"])
    flags.inherit(args, {"args": {"device": device, "dtype": dtype}}, "config.json")
    assert flags.settle(p, args).dtype == wanted
    with pytest.raises(UserError, match="config.json: dtype 'int8': must be one of"):
        flags.inherit(args, {"args": {"dtype": "int8"}}, "config.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(tmp_path, monkeypatch, capsys):
    """Else forty lines of CUDA's initialisation."""
    monkeypatch.chdir(tmp_path)
    assert "--device cuda: torch" in said(monkeypatch, capsys, "distill.py", "--device", "cuda")
    assert "--cuda-graphs" in said(monkeypatch, capsys, "distill.py", "--cuda-graphs")


@pytest.mark.parametrize("changes, naming", [
    ({"steps": "x"}, "--steps"), ({"steps": [3]}, "steps = "), ({"lam": -1}, "--lam"),
    ({"thinking": "yes"}, "--thinking"),
    ({"help": True}, "help"), ({"device": "tpu"}, "--device"), ({"device": "cpu:0"}, "--device"),
    ({"task": "gsm"}, "--task"), ({"data": "a\0b"}, "data"), ({"task": "\ud800"}, "task"),
    ({"steps": True}, "steps"), ({"model": {}}, "model"), ({"samples": None}, None),
    ({"shard": True}, "give --no-shard"), ({"cuda_graphs": True}, "give --no-cuda-graphs"),  # which nobody typed now
])
def test_a_runs_recorded_flags_are_checked_like_typed_ones(home, monkeypatch, capsys, changes, naming):
    """Else a damaged config.json ends in a traceback, or resumes another run."""
    config(home / "two", **changes)
    (home / "two" / "complete.json").unlink()
    if naming is not None:
        assert naming in said(monkeypatch, capsys, "rloo.py", "--resume", home / "two")


# the operating system

def test_a_folder_that_cant_be_written_is_one_line(home, monkeypatch, capsys):
    """Else a traceback after the model has loaded."""
    monkeypatch.chdir(home)
    (home / "file").write_text("")
    command = ("distill.py", "--model", "toy", *SMALL, "--out")
    for out in ("file", "file/x", "x" * 300, "/proc/nope/x"):
        assert out[:10] in said(monkeypatch, capsys, *command, out)
    for out in ("file/x", "x" * 300, "/proc/nope/x"):
        assert out[:5] in said(monkeypatch, capsys, "evaluate.py", "--merge", "one", "--out", out)


@pytest.mark.parametrize("size", [300, 4_000, 30_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(home, size):
    """Else a traceback, and a run that can't be resumed when there is room again."""
    done = run("rloo.py", *RL, "--init", "one", "--out", "r", cwd=home, ok=False, before=partial(full, size))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "File too large" in done.stderr.splitlines()[-1]
    assert "r/" in done.stderr.splitlines()[-1] or " r: " in done.stderr.splitlines()[-1]
    again = ("--resume", "r") if (home / "r" / "config.json").exists() else (*RL, "--init", "one", "--out", "r")
    run("rloo.py", *again, cwd=home)


def full(size: int) -> None:
    """No file may grow beyond `size` bytes: what a full disk does, without filling one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_pipe_ends_without_a_traceback(home, stream):
    """Else `python evaluate.py | head` ends in one."""
    done = run("evaluate.py", "one", "--n", 2, "--out", "eval", cwd=home, ok=None, before=partial(close, stream))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def close(stream: int) -> None:
    """The reader of this stream has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, stream)


def test_faults_of_ours_show_their_traceback():
    """Else a bug is taken for the user's mistake."""
    def broken():
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        runs.run_main(broken)


def test_misleading_words_are_gone(home, monkeypatch, capsys):
    """Else a missing run is called a checkpoint, and a user is sent to a flag that does nothing."""
    monkeypatch.chdir(home)
    assert "nothing: no such folder" in said(monkeypatch, capsys, "evaluate.py", "nothing")
    with pytest.raises(UserError, match="nothing: no such folder; give the folder of a run"):
        load_policy(toy_model(), home / "nothing")
    (home / "empty").mkdir()
    assert "not the folder of a run" in said(monkeypatch, capsys, "evaluate.py", "empty")
    shutil.copy(home / "one" / "config.json", home / "empty")
    assert "no checkpoint in it yet" in said(monkeypatch, capsys, "evaluate.py", "empty")
    assert load_policy(Transformer.from_pretrained(home / "toy"), home / "one").exits == (2,)


@pytest.mark.parametrize("thinks", [True, False])
def test_only_a_model_that_can_think_is_told_not_to(tmp_path, thinks):
    """Else SmolLM2's user is told to pass --no-thinking, and in stage 1 that unfinished responses count as wrong."""
    folder = toy_checkpoint(tmp_path / "toy", layers=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 262}')
    if not thinks:
        edit(folder / "tokenizer_config.json", lambda config: config.update(
            chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"))
    done = run("distill.py", "--model", "toy", *SMALL, "--max-new-tokens", 1, cwd=tmp_path)
    assert ("--no-thinking" in done.stderr) == thinks == ("thinking on" in done.stdout)
    assert "learns nothing about how they end" in done.stderr and "right" not in done.stderr
    if thinks:
        done = run("distill.py", "--model", "toy", *SMALL, "--max-new-tokens", 1, "--no-thinking", cwd=tmp_path)
        assert "unfinished" in done.stderr and "--no-thinking" not in done.stderr  # it does not already


def test_help_explains_every_flag(monkeypatch):
    """Else 'A / B', a flag or a default can only be found out from the source."""
    shown = []
    monkeypatch.setattr("argparse.ArgumentParser.print_help", lambda p: p.format_help() and shown.append(p))
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    for path in (p for p in [*ROOT.glob("*.py"), *ROOT.glob("study/*.py")] if "def main()" in p.read_text()):
        with pytest.raises(SystemExit):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)).main()
    assert len(shown) > 9 and all("'A / B', the flag's default" in p.epilog for p in shown if getattr(p, "pairs", ()))
    assert not [a for p in shown for a in p._actions[1:]  # the first is --help
                if not a.help or "default" not in a.help and a.default not in (None, False, ())]
