"""The commands as a user types them, in a process of their own: offline, on toy checkpoints."""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import distill
import evaluate
import rloo
import runs
from exits import Policy
from model import Transformer
from tests.toys import toy_model

ROOT = Path(__file__).parent.parent
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "<|im_start|>assistant\n"
            "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}")


def toy_checkpoint(folder, layers=4):
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
    model = toy_model(0, vocab_size=263, num_hidden_layers=layers, max_position_embeddings=4096)
    config = {k: v for k, v in vars(model.config).items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return folder


def run(*command, cwd, ok=True, **env):
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


SMALL = ("--responses", 6, "--held-out", 3, "--max-new-tokens", 12, "--steps", 2)
RL = ("--steps", 2, "--k", 2, "--batch-size", 2, "--problems", 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a toy checkpoint and a complete run of each stage, made by the two commands."""
    home = tmp_path_factory.mktemp("trained")
    toy_checkpoint(home / "toy")
    run("distill.py", "--model", "toy", "--task", "arithmetic", *SMALL, cwd=home)
    run("rloo.py", "--lam", "0.1", *RL, cwd=home)
    return home


def test_literal_command_on_a_hub_model_offline(tmp_path):
    """`python distill.py --model Qwen/Qwen3-4B` with nothing else must find model and GSM8K in the hub's cache."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet
    hub = tmp_path / "home" / "hub"
    for kind, sha in (("models--Qwen--Qwen3-4B", "a" * 40), ("datasets--openai--gsm8k", "b" * 40)):
        (hub / kind / "refs").mkdir(parents=True)
        (hub / kind / "refs" / "main").write_text(sha)
    toy_checkpoint(hub / "models--Qwen--Qwen3-4B" / "snapshots" / ("a" * 40), layers=2)
    data = hub / "datasets--openai--gsm8k" / "snapshots" / ("b" * 40) / "main"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        questions = [f"Ann has {i} {split} pens and buys 2. How many?" for i in range(9)]
        pyarrow.parquet.write_table(pyarrow.table({
            "question": questions, "answer": [f"{i}+2=<<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}" for i in range(9)]}),
            data / f"{split}-00000-of-00001.parquet")
    done = run("distill.py", "--model", "Qwen/Qwen3-4B", "--steps", 2, cwd=tmp_path, HF_HOME=str(tmp_path / "home"),
               HF_HUB_OFFLINE="1")
    assert "next: python rloo.py" in done.stdout
    (config,) = tmp_path.glob("runs/*/config.json")
    assert json.loads(config.read_text())["revision"] == "a" * 40
    assert len(list(tmp_path.glob("runs/distill-*/step-000002"))) == 1


def test_rloo_continues_from_the_newest_complete_run(trained):
    """Neither a newer but interrupted stage-1 run nor an older complete one is picked up; the choice is printed."""
    older = trained / "runs" / "distill-99999999-000001"
    shutil.copytree(next(iter(trained.glob("runs/distill-2*"))), older)
    os.utime(older / "complete.json", (1, 1))
    broken = trained / "runs" / "distill-99999999-000000"
    shutil.copytree(next(iter(trained.glob("runs/distill-2*"))), broken)
    (broken / "complete.json").unlink()
    done = run("rloo.py", *RL[:1], 1, *RL[2:], "--out", "again", cwd=trained)
    shutil.rmtree(broken)
    shutil.rmtree(older)
    assert "stage 1: runs/distill-2" in done.stdout


def test_completions_let_an_outsider_recompute_everything(trained):
    """Rewards, advantages and metrics follow from completions.jsonl alone."""
    (folder,) = trained.glob("runs/rloo-*")
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and [m["step"] for m in metrics] == [0, 1]
    for i in range(0, 8, 2):
        pair = rows[i : i + 2]
        rewards = [r["task"] - 0.1 * sum(r["depths"]) / len(r["depths"]) / 4 - 0.02 * r["mean_kl"] for r in pair]
        assert [r["reward"] for r in pair] == pytest.approx(rewards)
        assert [r["advantage"] for r in pair] == pytest.approx([rewards[0] - rewards[1], rewards[1] - rewards[0]])
    for m in metrics:
        mine = [r for r in rows if r["step"] == m["step"]]
        depths = [d for r in mine for d in r["depths"]]
        assert m["average_compute"] == pytest.approx(sum(depths) / len(depths) / 4)
        assert m["reward"] == pytest.approx(sum(r["reward"] for r in mine) / 4)
        assert m["drift_max"] < 1e-4
    assert all(len(r["depths"]) == len(r["token_ids"]) == len(r["logp_exit"]) == len(r["logp_token"]) for r in rows)


def test_evaluate_compares_all_three_and_writes_its_files(trained):
    """The table, the JSON and the page of base, stage 1 and stage 2."""
    done = run("evaluate.py", "--n", 4, "--max-new-tokens", 12, "--delta", 0.5, "--out", "eval", cwd=trained)
    metrics = json.loads((trained / "eval" / "evaluation.json").read_text())["metrics"]
    assert [m["name"] for m in metrics] == ["base", "stage 1", "stage 2"]
    assert metrics[0]["exit_rate"] == 0 and metrics[0]["average_compute"] == 1
    assert "stage 2" in done.stdout and "<html" in (trained / "eval" / "page.html").read_text()


def test_merge_writes_a_plain_checkpoint_with_the_adapters_in_it(trained):
    """The merged folder loads as a base model and computes what base + LoRA computes at full depth."""
    from exits import load_policy
    from model import Transformer
    (folder,) = trained.glob("runs/rloo-*")
    run("evaluate.py", "--merge", folder, "--out", "merged", cwd=trained)
    ids = torch.arange(12)[None]
    base = Transformer.from_pretrained(trained / "toy")
    expected = load_policy(base, folder / "step-000002").model(ids)
    merged = Transformer.from_pretrained(trained / "merged")
    assert (merged(ids) - expected).abs().max() < 1e-4
    assert (trained / "merged" / "tokenizer.json").exists()


@pytest.mark.parametrize("script", ["distill.py", "rloo.py"])
def test_a_killed_run_resumes_to_the_same_bits(trained, tmp_path, script):
    """kill -9 between checkpoints, then --resume: adapters, heads and metrics equal the unbroken run's."""
    if script == "distill.py":
        flags = ("--model", trained / "toy", "--task", "arithmetic", *SMALL[:-1], 6, "--save-every", 2)
    else:
        (init,) = trained.glob("runs/distill-*")
        shutil.copytree(trained / "toy", tmp_path / "toy")
        flags = ("--init", init, *RL[2:], "--steps", 6, "--save-every", 2)
    run(script, *flags, "--out", "whole", cwd=tmp_path)
    process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags), "--out", "broken"], cwd=tmp_path,
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "broken" / "step-000002").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken" / "complete.json").exists()
    (tmp_path / "broken" / ".partial-000004").mkdir()  # as a kill in the middle of a save leaves it
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:  # and lines of steps after the last checkpoint
        file.write('{"step": 5, "stale": 1}\n{"step": 5, "st')
    run(script, "--resume", "broken", cwd=tmp_path)
    for name in ("adapter_model", "exit_heads", "optimizer"):
        whole, broken = (load_file(tmp_path / side / "step-000006" / f"{name}.safetensors")
                         for side in ("whole", "broken"))
        assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)
    losses = [[{k: v for k, v in json.loads(line).items() if "seconds" not in k}
               for line in (tmp_path / side / "metrics.jsonl").read_text().splitlines()]
              for side in ("whole", "broken")]
    assert losses[0] == losses[1]


def test_seed_changes_the_samples(trained):
    """A seed that nothing reads would make every 'five seeds' table one run."""
    texts = []
    for seed in (0, 1):
        run("evaluate.py", "--n", 3, "--max-new-tokens", 12, "--seed", seed, "--out", f"seed{seed}", cwd=trained)
        rows = (trained / f"seed{seed}" / "completions.jsonl").read_text().splitlines()
        texts.append([json.loads(row)["token_ids"] for row in rows])
    assert texts[0] != texts[1]


def test_teacher_responses_differ_by_seed_and_by_split(tmp_path, monkeypatch):
    """On the same problems, so that only the random numbers can tell the runs apart."""
    toy_checkpoint(tmp_path / "toy")
    problems = runs.tasks.load("arithmetic", "train", n=4, seed=0)
    monkeypatch.setattr(runs.tasks, "load", lambda *args, **options: problems)
    policy = Policy(Transformer.from_pretrained(tmp_path / "toy"), (1, 2, 3))
    tokenizer, texts = runs.Tokenizer.from_pretrained(tmp_path / "toy"), []
    for seed in (0, 1):
        args = argparse.Namespace(teacher=None, task="arithmetic", data=None, thinking=True, seed=seed, rows=None,
                                  responses=4, held_out=4, max_new_tokens=12)
        run = runs.Run(tmp_path / f"seed{seed}", args)
        run.folder.mkdir()
        got = distill.teacher_responses(run, policy, tokenizer, args)
        texts += [[row["token_ids"] for row in got[split]] for split in ("train", "test")]
    assert all(a != b for a, b in itertools.combinations(texts, 2))


def test_compiled_mlps_change_no_result(trained, tmp_path, monkeypatch):
    """--compile must reach the MLPs, with their adapters, in sampling and in training."""
    compile_by, compiled = torch.compile, []

    def without_a_cpp_compiler(function, **options):  # which the default backend wants
        compiled.append(function)
        return compile_by(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", without_a_cpp_compiler)
    monkeypatch.chdir(trained)
    for flags in ((), ("--compile",)):
        argv = ("rloo.py", *RL, *flags, "--out", tmp_path / f"run{len(flags)}")
        monkeypatch.setattr(sys, "argv", [str(part) for part in argv])
        rloo.main()
    metrics = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
               for name in ("run0", "run1")]
    assert len(compiled) == 4
    for one, other in zip(*metrics, strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


BAD = {
    "no stage-1 run": (("rloo.py",), "python distill.py"),
    "k of one": (("rloo.py", "--k", 1), "--k 1"),
    "absent model": (("distill.py", "--model", "./nothing"), "nothing"),
    "stride out of range": (("distill.py", "--model", "toy", "--task", "stories", "--exit-every", 9), "--exit-every 9"),
    "prompt beyond the context": (("distill.py", "--model", "toy", "--task", "arithmetic", "--max-new-tokens", 4090),
                                  "--max-new-tokens"),
    "graphs without CUDA": (("distill.py", "--model", "toy", "--device", "cpu", "--cuda-graphs"), "--cuda-graphs"),
    "no steps": (("distill.py", "--model", "toy", "--steps", 0), "--steps 0"),
    "malformed data": (("distill.py", "--model", "toy", "--data", "bad.jsonl"), "bad.jsonl:2"),
    "missing column": (("distill.py", "--model", "toy", "--data", "column.jsonl"), "answer"),
    "empty data": (("distill.py", "--model", "toy", "--data", "empty.jsonl"), "empty.jsonl"),
    "absent teacher": (("distill.py", "--model", "toy", "--task", "arithmetic", "--teacher", "x.jsonl"), "x.jsonl"),
    "run of another version": (("rloo.py", "--resume", "old"), "earlier version"),
    "not a run": (("evaluate.py", "toy"), "toy"),
    "nothing to evaluate": (("evaluate.py",), "python distill.py"),
    "merge without out": (("evaluate.py", "--merge", "toy"), "--out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line(case, tmp_path, monkeypatch, capsys):
    """A user's mistake is told in one line that names it, with exit code 2, and nothing half-written is left."""
    toy_checkpoint(tmp_path / "toy")
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n{"question": \n')
    (tmp_path / "column.jsonl").write_text('{"question": "q"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text('{"stage": "rloo", "args": {"model": "toy"}}')
    command, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as end:
        runs.run_main({"distill.py": distill, "rloo.py": rloo, "evaluate.py": evaluate}[command[0]].main)
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and errors[-1].startswith("error: ") and expected in errors[-1]
    assert not list(tmp_path.glob("runs/*/step-*")) and not list(tmp_path.glob("runs/*/complete.json"))


def test_offline_without_the_model_is_one_line(tmp_path):
    """HF_HUB_OFFLINE with an empty cache: a short message that says so, no traceback, no wait for the network."""
    done = run("distill.py", "--model", "Qwen/Qwen3-4B", cwd=tmp_path, ok=False, HF_HUB_OFFLINE="1",
               HF_HOME=str(tmp_path))
    assert done.returncode == 2 and "HF_HUB_OFFLINE" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
