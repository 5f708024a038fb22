"""The commands as a user types them, in a process of their own: offline, on toy checkpoints."""

import argparse
import json
import math
import os
import shutil
import sys
from functools import partial

import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants

import evaluate
import rloo
import runs
from checkpoints import load_policy
from model import Transformer
from tests.commands import RL, config, fresh, lines, run, toy_checkpoint
from tests.test_fields import said
from tests.toys import assert_close, reference, toy_policy


def test_literal_command_on_a_hub_model_offline(tmp_path):
    """`python distill.py --model Qwen/Qwen3-4B` with nothing else must find model and GSM8K in the hub's cache."""
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
    done = fresh("distill.py", "--model", "Qwen/Qwen3-4B", "--steps", 2, cwd=tmp_path, HF_HOME=str(tmp_path / "home"),
                 HF_HUB_OFFLINE="1")
    assert "next: python rloo.py" in done.stdout
    (config,) = tmp_path.glob("runs/*/config.json")
    assert json.loads(config.read_text())["args"]["revision"] == "a" * 40
    assert len(list(tmp_path.glob("runs/distill-*/step-000002"))) == 1


def impatient():
    rloo.FLAT = 1


def test_rloo_continues_from_the_newest_complete_run(trained):
    """Neither a newer but interrupted stage-1 run nor an older complete one is picked up; the choice is printed. And
    nothing that it samples is right: a night of that would be wasted unsaid."""
    older = trained / "runs" / "distill-99999999-000001"
    shutil.copytree(next(iter(trained.glob("runs/distill-2*"))), older)
    os.utime(older / "complete.json", (1, 1))
    broken = trained / "runs" / "distill-99999999-000000"
    shutil.copytree(next(iter(trained.glob("runs/distill-2*"))), broken)
    (broken / "complete.json").unlink()
    done = run("rloo.py", *RL[:-1], 1, "--out", "again", cwd=trained, before=impatient)
    shutil.rmtree(broken)
    shutil.rmtree(older)
    assert "runs/distill-2" in done.stdout
    assert "1 steps in a row the samples of every prompt earned the same task reward" in done.stderr


def test_completions_let_an_outsider_recompute_everything(trained):
    """Rewards, advantages and metrics follow from completions.jsonl alone."""
    (folder,) = trained.glob("runs/rloo-*")
    rows, metrics = lines(folder / "completions.jsonl"), lines(folder / "metrics.jsonl")
    assert len(rows) == 8 and [m["step"] for m in metrics] == [0, 1]
    for i in range(0, 8, 2):
        pair = rows[i : i + 2]
        rewards = [r["reward_task"] - 0.1 * sum(r["depths"]) / len(r["depths"]) / 4 - 0.02 * r["mean_kl"] for r in pair]
        assert [r["reward"] for r in pair] == pytest.approx(rewards)
        assert [r["advantage"] for r in pair] == pytest.approx([rewards[0] - rewards[1], rewards[1] - rewards[0]])
    for m in metrics:
        mine = [r for r in rows if r["step"] == m["step"]]
        depths = [d for r in mine for d in r["depths"]]
        assert m["average_compute"] == pytest.approx(sum(depths) / len(depths) / 4)
        assert m["reward"] == pytest.approx(sum(r["reward"] for r in mine) / 4)
        assert m["drift_max"] < 1e-4
        parts = sum(value for name, value in m.items() if name.startswith("reward_"))
        assert m["reward"] == pytest.approx(parts, abs=1e-9)
    assert all(isinstance(r["text"], str) for r in rows)
    assert all(len(r["depths"]) == len(r["token_ids"]) == len(r["logp_exit"]) == len(r["logp_token"]) for r in rows)


def test_evaluate_compares_all_three_and_writes_its_files(trained):
    """The table, the JSON and the page of base, stage 1 and stage 2."""
    done = run("evaluate.py", "--n", 4, "--max-new-tokens", 12, "--delta", 0.5, "--out", "eval", cwd=trained)
    metrics = json.loads((trained / "eval" / "evaluation.json").read_text())["metrics"]
    assert [m["name"] for m in metrics] == ["base", "stage 1", "stage 2"]
    assert metrics[0]["exit_rate"] == 0 and metrics[0]["average_compute"] == 1
    assert "stage 2" in done.stdout and "<html" in (trained / "eval" / "page.html").read_text()
    assert metrics[1]["exit_rate"] > 0 and "exits drawn, delta 0.5;" in done.stdout
    done = run("evaluate.py", "--n", 4, "--max-new-tokens", 12, "--threshold", 1, "--out", "full", cwd=trained)
    metrics = json.loads((trained / "full" / "evaluation.json").read_text())["metrics"]
    assert [m["exit_rate"] for m in metrics] == [0, 0, 0] and "exits at p > 1.0;" in done.stdout


def test_metrics_are_pooled_over_tokens_and_responses_by_hand():
    """The README's figures: a mean of means, another divisor or another interval, and every table says so."""
    rows = [{"depths": depths, "correct": right, "flexible": True, "finished": right} for depths, right in (
        ([2, 2, 4], True), ([8], False), ([4, 8, 8, 8], False), ([2, 8], True))]
    m = evaluate.measure(rows, [2, 4, 8])
    wanted = {"n": 4, "accuracy": 0.5, "accuracy_flexible": 1, "exit_rate": 0.5, "average_compute": 54 / 80,
              "layer_savings": 26 / 80, "total_compute": 54 / 8 / 4, "length": 2.5, "finished": 0.5}
    assert {name: m[name] for name in wanted} == pytest.approx(wanted)
    assert m["exit_histogram"] == {"2": 0.3, "4": 0.2, "8": 0.5}
    assert evaluate.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert evaluate.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    gains = [1, 0, 0, 1, -1, 0]
    gain, half = evaluate.paired([0, 1, 0, 0, 1, 1], [1, 1, 0, 1, 0, 1])
    assert (gain, half) == pytest.approx((1 / 6, 1.96 * sum((g - 1 / 8) ** 2 for g in (*gains, 1, -1)) ** 0.5 / 8))


@pytest.mark.parametrize("base", [False, True])
def test_the_page_shows_what_heads_and_lenses_said_of_each_token(base):
    """Else it colours other tokens than the model stopped at, or shows the base through adapters, lenses without
    their norm, or exits as they were before delta."""
    policy, depths = toy_policy(1).double(), [6] * 4 if base else [2, 6, 4, 6]
    row = {"prompt_ids": [5, 17, 42], "token_ids": [9, 1, 30, 8], "depths": depths, "logp_exit": [], "logp_token": [],
           "finished": True, "correct": True, "value": "3"}
    tokenizer = argparse.Namespace(pieces=lambda ids: list(map(str, ids)))
    shown = evaluate.transcript(policy, row, tokenizer, base, argparse.Namespace(delta=0.5))
    slow, ids = reference(policy, base), [5, 17, 42, 9, 1, 30]
    streams = slow.streams(ids, [6, 6, *depths])
    assert shown["tokens"] == ["9", "1", "30", "8"] and shown["depths"] == depths and len(shown["top"]) == 4
    for t, lenses in enumerate(shown["top"]):
        for depth, lens in zip((2, 4, 6), lenses, strict=True):
            p, best = slow.read_out(streams[depth][2 + t]).softmax(-1).topk(3)
            assert [token for token, _ in lens] == list(map(str, best.tolist()))
            assert_close([q for _, q in lens], p)
        if not base:
            z = torch.stack([slow.exit_logit(streams[depth][2 + t], i) for i, depth in enumerate((2, 4))])
            assert_close(shown["exit_probs"][t], (z + 0.5).sigmoid())
    assert len(shown["exit_probs"]) == (0 if base else 4)


def test_the_headline_says_what_stage_2_did_on_stage_1_too():
    """Else a stage 2 that made stage 1 worse passes for one that holds the base's accuracy."""
    base, first, second = ({"name": name, "accuracy": a, "average_compute": c, "finished": 1.0}
                           for name, a, c in (("base", 0.5, 1.0), ("stage 1", 0.75, 0.5), ("stage 2", 0.5, 0.625)))
    rows = {name: [{"correct": bool(x)} for x in right] for name, right in (
        ("base", (1, 1, 0, 0)), ("stage 1", (1, 1, 1, 0)), ("stage 2", (1, 1, 0, 0)))}
    half = 100 * evaluate.paired([1, 1, 1, 0], [1, 1, 0, 0])[1]
    said = evaluate.headline(base, first, second, rows)
    assert said == ("stage 2: 50.0% against the base's 50.0% (+0.0 ± 46.2 points on the same 4 problems: no "
                    f"significant difference), running 62% of its layers; -25.0 ± {half:.1f} points from stage 1, "
                    "which runs 50%")
    few = {"base": [{"correct": x < 5} for x in range(10)], "stage 1": [{"correct": x < 2} for x in range(10)]}
    assert "no significant" in evaluate.headline(base, base, first, few)  # three of three fall so in a quarter of cases
    alone = evaluate.headline(base, base, base, rows)
    assert "points from" not in alone and "(+0.0 ± 46.2 points" in alone  # of 4 alike not much is known


def test_a_difference_of_few_problems_claims_about_what_the_exact_test_does():
    """Else four problems that are won of 300, by luck in one case of eight, pass for an improvement, or an interval of
    0 stands where nothing, or everything, has changed."""
    for won in range(1, 15):
        for lost in range(won):
            gain, half = evaluate.paired([0] * won + [1] * lost + [1] * 300, [1] * won + [0] * lost + [1] * 300)
            chance = 2 * sum(math.comb(won + lost, i) for i in range(lost + 1)) / 2 ** (won + lost)  # McNemar's test
            assert chance < 0.07 if gain > half else chance > 0.03
    for after, gain in (((0,), 0), ((1,), 1), ((0, 0), 0), ((1, 1), 1)):
        found, half = evaluate.paired([0] * len(after), after)
        assert found == gain and 0.6 < half <= 1
    assert evaluate.paired([0.5, 0.5], [0.75, 0.75], shares=False) == (0.25, 0)
    # means over three seeds, all a third higher but for rounding
    gain, half = evaluate.paired([0, 1 / 3, 2 / 3] * 10, [1 / 3, 2 / 3, 1] * 10)
    assert (gain, half) == pytest.approx((1 / 3, 1.96 * ((30 / 9 + 2) / 32 - (10 / 32) ** 2) ** 0.5 / 32**0.5))


def _recorder():
    import types
    rows = []
    sys.modules["trackio"] = types.SimpleNamespace(
        init=lambda **given: rows.append([given["project"], given["name"]]), finish=lambda: print("curves", rows),
        log=lambda row, step: rows.append([step, row["step"], "reward" in row]))


def _absent():
    sys.modules["trackio"] = None


def test_metrics_are_live_curves_too(trained, tmp_path):
    """If it fails, --trackio shows nothing, or a run learns only after its first step that it isn't installed."""
    done = run("rloo.py", *RL, "--trackio", "depth", "--out", tmp_path / "live", cwd=trained, before=_recorder)
    assert "curves [['depth', 'live'], [0, 0, True], [1, 1, True]]" in done.stdout
    done = run("rloo.py", *RL, "--trackio", "depth", "--out", tmp_path / "no", cwd=trained, before=_absent, ok=False)
    assert "pip install trackio" in done.stderr and done.returncode == 2
    assert not (tmp_path / "no" / "metrics.jsonl").exists()


def test_merge_writes_a_plain_checkpoint_with_the_adapters_in_it(trained):
    """The merged folder loads as a base model and computes what base + LoRA computes at full depth."""
    (folder,) = trained.glob("runs/rloo-*")
    alone = shutil.copytree(folder, trained / "alone")
    config(alone, task="/gone.jsonl")  # not needed
    run("evaluate.py", "--merge", alone, "--out", "merged", cwd=trained)
    ids = torch.arange(12)[None]
    base = Transformer.from_pretrained(trained / "toy")
    expected = load_policy(base, folder / "step-000002").model(ids)
    merged = Transformer.from_pretrained(trained / "merged")
    assert (merged(ids) - expected).abs().max() < 1e-4
    assert (trained / "merged" / "tokenizer.json").exists()


def test_seed_changes_where_adapters_and_heads_start(trained):
    """Else calibrations of several seeds begin as one."""
    starts = []
    for seed in (0, 1, 0):
        runs.load_model(argparse.Namespace(seed=seed, model=str(trained / "toy"), revision=None, thinking=True,
                                           device="cpu", dtype="float32", shard=False, cuda_graphs=False))
        starts.append(float(torch.rand(())))
    assert starts[0] == starts[2] != starts[1]


def test_depth_is_charged_for_right_answers_only_where_asked(trained, tmp_path):
    """On a task that calls some responses right, whatever they say. A gate on the wrong side pays for mistakes."""
    (tmp_path / "even.py").write_text("""
def problems(split, n, seed):
    return [{"question": f"{split} {i}", "answer": i} for i in range(n)]

def grade(problem, response):
    return len(response) % 2 == 0
""")
    run("rloo.py", *RL, "--task", tmp_path / "even.py", "--samples", 8, "--lam", 0.5, "--gate-depth-on-correct",
        "--out", tmp_path / "gated", cwd=trained)
    rows, L = lines(tmp_path / "gated" / "completions.jsonl"), 4
    assert {row["correct"] for row in rows} == {True, False}
    for row in rows:
        charged = sum(row["depths"]) / len(row["depths"]) / L if row["correct"] else 0
        assert row["reward"] == pytest.approx(row["reward_task"] - 0.5 * charged - 0.02 * row["mean_kl"])
    for metrics in lines(tmp_path / "gated" / "metrics.jsonl"):
        parts = sum(value for name, value in metrics.items() if name.startswith("reward_"))
        assert metrics["reward"] == pytest.approx(parts)


BAD = {
    "no stage-1 run": (("rloo.py",), "python distill.py"),
    "absent model": (("distill.py", "--model", "./nothing"), "nothing"),
    "stride out of range": (("distill.py", "--model", "toy", "--task", "arithmetic", "--exit-every", 9),
                            "--exit-every 9"),
    "run of another version": (("rloo.py", "--resume", "old"), "another version"),
    "not a run": (("evaluate.py", "toy"), "toy"),
    "nothing to evaluate": (("evaluate.py",), "python distill.py"),
    "a base that exits": (("evaluate.py", "base", "--threshold", 0.5), "--threshold"),
    "no such run": (("rloo.py", "--init", "nowhere"), "nowhere: no such folder"),
    "a file to write into": (("evaluate.py", "base", "--model", "toy", "--task", "arithmetic", "--n", 1, "--out",
                              "toy/config.json"), "--out toy/config.json is a file"),
    "merge without out": (("evaluate.py", "--merge", "toy"), "--out"),
    "merge beside runs": (("evaluate.py", "old", "--merge", "toy", "--out", "merged"), "--merge takes one run"),
    "unset variable": (("distill.py", "--resume", ""), "--resume is empty"),
    "run as a model": (("distill.py", "--model", "old"), "--model old is a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line(case, tmp_path, monkeypatch, capsys):
    """A user's mistake is told in one line that names it, with exit code 2, and nothing half-written is left."""
    toy_checkpoint(tmp_path / "toy")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    (tmp_path / "old" / "config.json").write_text('{"stage": "rloo", "args": {"model": "toy"}}')
    monkeypatch.chdir(tmp_path)
    command, expected = BAD[case]
    assert expected in said(monkeypatch, capsys, *command)
    assert not list(tmp_path.glob("runs/*/step-*")) and not list(tmp_path.glob("runs/*/complete.json"))


@pytest.mark.parametrize("error", [None, MemoryError(), RuntimeError("CUDA error: out of memory. Compile with …"),
                                   RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_too_little_memory_is_one_line_whoever_ran_out(error, capsys):
    """A driver's and cuBLAS's are plain RuntimeErrors: a traceback where a flag would help."""
    def main():
        raise error or torch.empty(2**60)  # which raises a CPU's own

    with pytest.raises(SystemExit) as end:
        runs.run_main(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: out of memory: use fewer --rows")


def offline(cache):
    """What HF_HUB_OFFLINE=1 and HF_HOME come to where the library is imported."""
    constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = True, cache


def test_offline_without_the_model_is_one_line(tmp_path):
    """HF_HUB_OFFLINE with an empty cache: a short message that says so, no traceback, no wait for the network."""
    done = run("distill.py", "--model", "Qwen/Qwen3-4B", "--task", "arithmetic", cwd=tmp_path, ok=False,
               before=partial(offline, str(tmp_path)))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert all(word in line for word in ("Qwen/Qwen3-4B", "HF_HUB_OFFLINE", str(tmp_path), "local folder"))
    assert not (tmp_path / "runs").exists()
