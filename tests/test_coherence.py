"""Coherence without a judge: the columns against slow computations, and the ranks of responses damaged on purpose."""

import json
import math
import random

import pytest

import flags
from data.hub import UserError
from data.text import Tokenizer
from exits import Policy
from model import Transformer
from study import coherence
from tests.commands import ROOT, config
from tests.toys import PROMPTS, reference, toy_policy

ROWS = [dict(prompt_ids=prompt, token_ids=tokens, finished=finished) for prompt, tokens, finished in zip(
    PROMPTS, ([7], [1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [5, 6, 5, 6, 5, 6, 5], [60, 0, 2]), (True, False, True, True),
    strict=True)]


def test_columns_against_a_slow_computation():
    """If it fails, perplexity isn't the base's at full depth (adapters or exits leak in), or a column isn't what its
    name says."""
    policy = toy_policy().double()
    base, logs = reference(policy, base=True), []
    for row in ROWS:
        ids, P = row["prompt_ids"] + row["token_ids"], len(row["prompt_ids"])
        logits = base.read_out(base.streams(ids[:-1], [base.L] * (len(ids) - 1))[-1])
        logs.append([float(logits[t].log_softmax(-1)[ids[t + 1]]) for t in range(P - 1, len(ids) - 1)])
    repeated = [0, 3 / 7, 2 / 4, 0]  # of 7 and 4 grams; 5656, 6565 come twice
    got = coherence.pooled(coherence.each(policy, ROWS, micro_batch=3))
    wanted = {"n": 4, "perplexity": math.exp(-sum(map(sum, logs)) / sum(map(len, logs))),
              "repetition": sum(repeated) / 4, "finished": 0.75,
              "coherence": sum(r["finished"] * (1 - rep) * math.exp(sum(log) / len(log))
                               for r, rep, log in zip(ROWS, repeated, logs, strict=True)) / 4}
    assert got == pytest.approx(wanted, rel=1e-9)


def test_damage_is_what_it_is_called():
    """If it fails, the calibration measures something else than its rows say."""
    steps, rng = [[i] for i in range(6)], random.Random(0)
    for name, how in coherence.DAMAGE.items():
        for _ in range(20):
            if isinstance(how, float):
                continue
            after = how(steps, rng)
            same = sum(a == b for a, b in zip(after, steps, strict=False))
            assert after != steps
            if "swapped" in name:
                assert sorted(after) == steps and same == 4
            elif "shuffled" in name:
                assert sorted(after) == steps
            elif "dropped" in name:
                assert len(after) == (5 if "one" in name else 3) and after == sorted(after) and after[-1] == [5]
            else:
                assert len(after) == 5 + int(name.split()[3]) and sorted(after) == after
    assert coherence.sentences([1, 2, 3, 4, 5, 6], ["a", ".", " b", "\n", "\n", "c"]) == [[1, 2], [3, 4, 5], [6]]
    assert coherence.sentences([1, 2, 3], ["3", ".", "5"]) == [[1, 2, 3]]
    assert coherence.body(["<think>\n", "a\n", "b\n", "</think>\n\n", "c"]) == range(1, 3)
    assert coherence.body(["a. ", "b. ", "c"]) == range(0, 2)


def test_planted_degradations_rank_below_their_originals():
    """If it fails, the composed number doesn't see a fault that it was made to see, and is not to be reported."""
    model = Transformer.from_pretrained(flags.EMBEDDED)
    policy, tokenizer = Policy(model, (2,)), Tokenizer.from_pretrained(flags.EMBEDDED)
    text = "<think>\nFirst Leo gives Kate 8: 30-8=22\nSecond Kate gives Leo 3: 22+3=25\nThird Leo finds 4: 25+4=29\n"
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Leo has 30 pens.\nFirst Leo gives Kate 8.\nSecond Kate "
                                    "gives Leo 3.\nThird Leo finds 4 more.\nHow many pens does Leo have now?"}])
    row = dict(prompt_ids=prompt, token_ids=tokenizer.encode(text + "</think>\n\n\\boxed{29}<|im_end|>"), finished=True)
    record = coherence.calibrate(policy, tokenizer, [row, row | {"finished": False}], 64, 0)
    assert (record["n"], record["left out"]) == (1, 1)
    for name, found in record["damaged"].items():
        assert found["ranked_below"]["coherence"] == 1.0, name
        assert found["coherence"] < record["original"]["coherence"], name
    worse = record["damaged"]["a step said 10 times"]["ranked_below"]
    assert worse["repetition"] == 1.0 and worse["finished"] == 0.5  # more of it is worse; a tie counts half
    assert record["damaged"]["all steps shuffled"]["ranked_below"]["perplexity"] == 1.0
    recorded = json.loads((ROOT / "docs" / "data" / "coherence.json").read_text())
    assert recorded["damaged"].keys() == coherence.DAMAGE.keys()


def test_folders_and_rows_that_do_not_fit_are_refused_by_name(tmp_path):
    """If it fails, a wrong folder or a damaged file ends in a traceback."""
    with pytest.raises(UserError, match="neither evaluation.json nor config.json"):
        coherence.about(tmp_path)
    with pytest.raises(UserError, match="no completions"):
        coherence.read(tmp_path, 5)
    row = {"model": "base", "id": "x", "text": "t", "prompt_ids": [1], "token_ids": [2], "finished": True}
    path = tmp_path / "completions.jsonl"
    for change, what in (({"token_ids": []}, "token_ids"), ({"token_ids": [61]}, "token_ids"), ({"finished": 1},
                         "finished"), ({"text": None}, "text")):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(UserError, match=f"completions.jsonl:1.*{what}"):
            coherence.read(tmp_path, 5, 61)
    path.write_text(json.dumps(row | {"text": "a\0b"}) + "\n")  # which a model can sample
    assert coherence.read(tmp_path, 5, 61)["base"][0]["text"] == "a\ufffdb"
    del row["model"]
    path.write_text("".join(json.dumps(row | {"step": step}) + "\n" for step in range(25)))
    groups = coherence.read(tmp_path, 2, 61)
    assert list(groups)[:2] == ["steps 0-2", "steps 3-5"] and len(groups["steps 3-5"]) == 2
    path.write_text("".join(json.dumps(row | {"model": "m", "id": str(i)}) + "\n" for i in range(7)))
    some = [r["id"] for r in coherence.read(tmp_path, 4, 61)["m"]]
    assert len(set(some)) == 4 and some == sorted(some) != ["0", "1", "2", "3"]
    path.write_text("".join(json.dumps(row | {"model": m, "id": str(i)}) + "\n" for i in range(40) for m in "mn"))
    both = [[int(r["id"]) for r in rows] for rows in coherence.read(tmp_path, 20, 61).values()]
    assert both[0] == both[1] and 5 <= sum(i % 2 for i in both[0]) <= 15  # of forms that take turns each, not one
    path.write_text("".join(json.dumps(row | {"model": "m", "id": str(i)}) + "\n" for i in range(7)))
    path.write_text(path.read_text() + '{"model": "m", "id"')  # a run that is writing
    assert len(coherence.read(tmp_path, 9, 61)["m"]) == 7


def test_the_file_of_a_task_may_be_away(home, monkeypatch):
    """Else an evaluation that was copied from another machine can't be read."""
    config(home / "two", task="/gone/own.py")
    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.argv", ["coherence.py", "two", "--n", "2"])
    coherence.main()
    record = json.loads((home / "two" / "coherence.json").read_text())
    assert record["task"] == "own.py" and [found["n"] for found in record["columns"].values()] == [2, 2]
