"""The benchmarks run, and their own arithmetic is right. Nothing here times anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = ["--model", str(ROOT / "data" / "tiny"), "--repeats", "1", "--threads", "1"]


@pytest.fixture
def bench(tmp_path):
    def run(script, *flags):
        out = tmp_path / "out.json"
        done = subprocess.run([sys.executable, ROOT / "bench" / f"{script}.py", *QUICK, *flags, "--out", out],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    return run


def test_decode_reports_depth_and_ideal_of_what_it_ran(bench):
    """L / mean depth and the efficiencies are what every claim about speed rests on."""
    record = bench("decode", "--batch", "3", "--context", "9", "--new", "4")["results"]["batch 3, context 9"]
    assert {"no exits, plain loop", "never firing", "depths = L", "all at 2 of 8", "all at 4 of 8", "all at 6 of 8",
            "random mix"} <= set(record)
    assert record["all at 2 of 8"]["mean_depth"] == 2 and record["all at 2 of 8"]["L_over_depth"] == 4
    assert record["never firing"]["mean_depth"] == 8 and 2 <= record["random mix"]["mean_depth"] <= 8
    ideal = {name: m["efficiency_own"] * m["ms_per_step"] for name, m in record.items()}
    assert ideal["all at 2 of 8"] < ideal["all at 6 of 8"] < ideal["depths = L"]
    assert ideal["never firing"] == pytest.approx(ideal["no exits, plain loop"])


def test_rollout_arms_sample_the_same_tokens(bench):
    """Continuous batching against batch after batch is a comparison only if both produce the same responses."""
    sizes = ("--prompts", "6", "--samples", "2", "--context", "5", "--new", "8", "--rows", "4")
    record = bench("rollout", *sizes)["results"]
    assert record["ragged"]["tokens"] == record["ragged, batch after batch"]["tokens"] < record["exits"]["tokens"] == 96
    assert record["ragged"]["mean_depth"] == record["ragged, batch after batch"]["mean_depth"]
    assert record["full depth"]["mean_depth"] == 8 > record["exits"]["mean_depth"]


def test_train_compares_equal_losses(bench):
    """A faster step that computes another loss is no faster step."""
    record = bench("train", "--batch", "2", "--length", "12")
    assert record["seconds"]["stage-1 step"] > 0
    if "peft" in record["losses"]:
        assert record["losses"]["ours"] == pytest.approx(record["losses"]["peft"], rel=1e-4)


def test_targets_and_loss_equal_the_naive_tables(bench):
    """The memory figure counts only if chunks compute the same quantities."""
    record = bench("train", "--memory", "40")
    assert record["40"]["seconds"] > 0
    assert max(record[name] for name in ("lens KL", "token KL", "gradient")) < 1e-5
