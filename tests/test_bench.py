"""The benchmarks run, and their own arithmetic is right. Nothing here times anything."""

import json
import sys
from types import SimpleNamespace

import pytest

import runs
from bench import harness
from checkpoints import load_policy
from data.hub import UserError
from data.text import Tokenizer
from model import Transformer
from sample import generate
from tests.commands import ROOT, run

QUICK = ["--model", str(ROOT / "data" / "tiny"), "--repeats", "1", "--threads", "1"]


def in_bench():
    """Stands where a script of bench/ finds common.py."""
    sys.path.insert(0, str(ROOT / "bench"))


@pytest.fixture
def bench(tmp_path):
    def of(script, *flags):
        run(f"{script}.py", *QUICK, *flags, "--out", "out.json", cwd=tmp_path, before=in_bench)
        return json.loads((tmp_path / "out.json").read_text())

    return of


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


def test_harness_refuses_a_bad_out_before_it_samples(tmp_path, monkeypatch):
    """Else an hour's samples are lost when they are to be written."""
    for out in (tmp_path, tmp_path / "none" / "out.json"):
        monkeypatch.setattr("sys.argv", ["harness", "base", "--tasks", "gsm8k", "--out", str(out)])
        with pytest.raises(UserError, match="--out .*must be a file"):
            harness.main()


def test_harness_gets_what_the_sampler_writes(trained, monkeypatch):
    """If it fails, lm-evaluation-harness scores other texts than ours, at other depths, or a task's settings that we
    lack are ignored. The stand-ins for its requests have what it documents: args = (context, settings)."""
    (folder,) = trained.glob("runs/rloo-*")
    policy, tokenizer = load_policy(Transformer.from_pretrained(trained / "toy"), folder), Tokenizer.from_pretrained(
        trained / "toy")
    args = SimpleNamespace(max_new_tokens=9, delta=0.5, threshold=None, seed=3, rows=None, thinking=True, model="toy",
                           asked=None)
    lm = harness.Exits(policy, tokenizer, args, base=False)
    chats = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    contexts = [lm.apply_chat_template(chat) for chat in chats]
    assert [tokenizer.encode(context) for context in contexts] == tokenizer.prompts(chats)

    def ask(**settings):
        return lm.generate_until([SimpleNamespace(args=(context, settings), task_name=name)
                                  for name, context in zip("aab", contexts, strict=True)])

    wanted = generate(policy, tokenizer.prompts(chats), max_new_tokens=9, temperature=0.0, delta=0.5,
                      eos_ids=tokenizer.eos_ids, seed=(3,))
    texts = [tokenizer.decode(r.token_ids[:-1] if r.finished else r.token_ids) for r in wanted]
    assert ask(do_sample=False) == texts
    assert {name: [r.depths for r in answered] for name, answered in lm.answered.items()} == {
        "a": [wanted[0].depths, wanted[1].depths], "b": [wanted[2].depths]}  # for each task's own compute
    stop = next(text for text in texts if len(text) > 1)[1]
    assert ask(do_sample=False, until=[stop, ""]) == [text.split(stop)[0] for text in texts]
    assert ask(do_sample=True, temperature=1.0) != texts
    assert max(len(tokenizer.encode(text)) for text in ask(do_sample=False, max_gen_toks=1)) <= 1
    lm.args.asked = 9  # by --max-new-tokens: a task's limit leaves no room for thoughts
    assert ask(do_sample=False, max_gen_toks=1) == texts
    monkeypatch.setattr(Tokenizer, "think_open", lambda self, prompt_ids: True)
    assert not any(ask(do_sample=False))  # all thought, since no </think> comes
    monkeypatch.setattr(runs, "text_of", lambda response, tokenizer: "<think>\n2\n</think>\n\nParis\n\nQ: two?")
    assert ask(do_sample=False, until=["\n\n"]) == ["Paris"] * 3  # and not what stands before the first blank line
    assert harness.graded({"answer": "9 * 2 = 18\n#### 18"}, ["\\boxed{\\$18.00}"]) == {"exact_match": True}
    with pytest.raises(UserError, match="top_p"):
        ask(do_sample=True, top_p=0.9)
    with pytest.raises(UserError, match="ranks"):
        lm.loglikelihood([])
    with pytest.raises(UserError, match="begins the answer"):
        lm.apply_chat_template(chats[0], add_generation_prompt=False)
