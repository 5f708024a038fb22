"""The study: exit rules against the reference, runs and answers made once, text that says what the JSON says."""

import argparse
import json
import os
import sys

import pytest
import torch

import distill
import monitor
from checkpoints import checkpoint, load_policy
from data import tasks
from data.hub import UserError, write_json
from evaluate import paired
from model import Transformer
from report import kinds
from sample import generate
from study import baselines, common, crossdomain, deciding, evaluations, fig2, fronts, heads, table1, tokens, write
from tests.chance import assert_frequencies
from tests.commands import ROOT, config
from tests.toys import PROMPTS, L, assert_close, reference, responses, toy_policy


def chosen(policy, rule, wanted):
    """Draws responses under a rule; each depth and log-probability must be what wanted(p_token (E + 1, V)) and the
    reference say. Returns all depths."""
    slow, depths = reference(policy), []
    drawn = generate(policy, PROMPTS, max_new_tokens=9, eos_ids=[0, 1, 2], seed=(3,), **rule(policy))
    for r in drawn:
        before = [L] * (len(r.prompt_ids) - 1)
        for t, token in enumerate(r.token_ids):
            _, p = slow.policy([*r.prompt_ids, *r.token_ids[:t]], before + r.depths[:t])
            assert r.depths[t] == slow.depth_of_outcome[[*wanted(p[:-1], p[-1]), True].index(True)]
            assert_close(r.logp_token[t], p[slow.depth_of_outcome.index(r.depths[t]), token].log())
        depths += r.depths
    return depths


def test_confidence_stops_at_the_first_exit_whose_lens_is_sure():
    """A lens without its norm, of another exit, or read past the exit would be another baseline than CALM's."""
    policy = toy_policy(2).double()
    tau = 0.32
    found = chosen(policy, baselines.confidence(tau),
                   lambda lenses, final: (lenses.amax(-1) >= tau).tolist())
    assert set(found) == {2, 4, 6}


def test_the_oracle_stops_at_the_first_exit_that_its_own_final_layer_confirms():
    """And its look ahead leaves no trace in the cache: else every later token attends to keys of another depth."""
    policy, eps = toy_policy().double(), 0.5

    def near(lenses, final):
        return ((final * (final / lenses).log()).sum(-1) <= eps).tolist()

    assert set(chosen(policy, baselines.oracle(eps), near)) == {2, 4, 6}


def test_random_exits_keep_the_histogram_and_nothing_else():
    """The control for 'the heads learned no more than how often to leave'."""
    rows = [{"depths": [2] * 5 + [6] * 3, "correct": 0, "flexible": 0, "finished": 1}, {
        "depths": [4, 4], "correct": 1, "flexible": 1, "finished": 1}]
    args = argparse.Namespace(problems=[None] * 3, max_new_tokens=2000, seed=1)
    histogram = baselines.histogram_of(common.Answers(rows, [2, 4, 6], None))
    depths = baselines.shuffled(args, histogram)(toy_policy())["depths"]
    assert depths.shape == (3, 2000)
    assert_frequencies([(depths == depth).sum() for depth in (2, 4, 6)], [0.5, 0.2, 0.3])
    together = ((depths[:, 1:] == 2) & (depths[:, :-1] == 2)).double().mean()
    assert abs(together - 0.25) < 0.03


def test_a_table_of_tokens_knows_the_token_just_read_and_nothing_else():
    """Read off by one, from the token that is predicted, it would know what no policy can; its draws keep the shares
    that the token had, and a token that it never met has everybody's."""
    rows = [{"prompt_ids": [9, 1], "token_ids": [5, 1, 7], "depths": [2, 4, 2]},  # read: 1, 5, 1
            {"prompt_ids": [1], "token_ids": [1, 6], "depths": [6, 4]}]  # 1, 1
    rule = baselines.by_token(common.Answers(rows, [2, 4, 6], None))
    policy = toy_policy()
    prompts = [[3, 5]] * 40 + [[3, 1]] * 600 + [[3, 8]] * 600
    drawn = generate(policy, prompts, max_new_tokens=2, eos_ids=[], **rule(policy))
    after = {token: [r.depths[0] for r in drawn if r.prompt_ids[-1] == token] for token in (5, 1, 8)}
    after[5] += [r.depths[1] for r in drawn if r.token_ids[0] == 5]
    assert set(after[5]) == {4} and len(after[5]) > 40
    assert_frequencies([after[1].count(d) for d in (2, 4, 6)], [0.5, 0.25, 0.25])
    assert_frequencies([after[8].count(d) for d in (2, 4, 6)], [0.4, 0.4, 0.2])


def test_a_sweep_is_read_between_its_settings():
    """Equal compute, by hand: compute 0.25 and 0.75 mixed one to three is 0.625."""
    def swept(depth, right):
        rows = [{"depths": [depth] * length, "correct": x} for length, x in zip((3, 5), right, strict=True)]
        return common.Answers(rows, [2, 8], None)

    longer = swept(8, (0, 0))._replace(rows=[{"depths": [8] * 24, "correct": 0}] * 2)
    half = swept(4, (1, 1))  # 8 tokens at half depth ten times to 48 at full depth once: (40 + 48) / (80 + 48)
    assert baselines.at_compute([half, longer], 44 / 64) == pytest.approx([10 / 11, 10 / 11])
    sweep = [swept(6, (1, 1)), swept(2, (0, 1)), swept(8, (1, 1))]
    assert baselines.at_compute(sweep, 0.625) == [0.75, 1.0]
    assert baselines.at_compute(sweep, 0.2) is None
    (c,) = baselines.against("it", [1.0, 1.0], baselines.at_compute(sweep, 0.625), rule="x")
    assert (c["change"], c["half"]) == paired([0.75, 1.0], [1.0, 1.0]) and c["change"] == 0.125


def test_one_seeds_weights_are_compared_with_that_seed_alone(tmp_path, monkeypatch):
    """Else the mean of the seeds is set beside one seed's luck under another rule, and the heads answer for it."""
    right = {"s1": (1, 1, 0, 0), "rl-0": (1, 1, 1, 0), "rl-1": (0, 0, 0, 0),
             "static-4": (1, 0, 0, 0), "rl-0-0-static-4": (1, 1, 0, 0)}
    depths = {"full depth": 8, "static 4": 4, **{f"static {depth}": 2 for depth in (2, 6)}}

    def told(args, source, how="learned", rule=None):
        return common.Answers([{"depths": [depths.get(how, 4)] * 3, "correct": x, "flexible": x, "finished": True,
                                "prompt_ids": [1], "token_ids": [1] * 3} for x in right.get(
                                    how in ("learned", "heads 0.5") and source.name, (0, 0, 0, 0))], [2, 4, 6, 8], None)

    s1, found = tmp_path / "s1", {}
    for name, value in (("arguments", lambda *_: argparse.Namespace(problems=[0] * 4, max_new_tokens=3, seed=0,
                                                                    depths=[4])),
                        ("one_depth", lambda args, depth: tmp_path / f"static-{depth}"),
                        ("stage_two", lambda args, name, lam, seed, init: tmp_path / f"rl-{lam:g}-{seed}-{init.name}"),
                        ("base_answers", lambda args: told(args, s1, "full depth")),
                        ("over_seeds", lambda args, make: [make(0), make(1)]),
                        ("from_kappa", lambda *_: (s1, [tmp_path / "rl-0", tmp_path / "rl-1"])),
                        ("lower_kappa", lambda args: (4, None, [])), ("save", lambda *_, **data: found.update(data))):
        monkeypatch.setattr(common, name, value)
    for name, value in (("checkpoint", str), ("exits_of", lambda folder: [2, 4, 6]), ("answers", told),
                        ("undrawn", lambda args, run: told(args, run, "heads 0.5")), ("plain_rl", lambda *_: s1),
                        ("point", lambda args, answered, **about: about)):
        monkeypatch.setattr(baselines, name, value)
    baselines.main()
    means = {(c["weights"], c["rule"]): c["accuracy"] for c in found["comparisons"] if c["of"] == "stage 2"}
    assert means["stage 2", "static"] == means["stage 2", "heads"] == 0.75
    assert means["base", "static"] == means["stage 1", "static"] == means["plain RL", "plain RL"] == 0.375
    assert {(c["of"], c["other"]) for c in found["comparisons"] if c["rule"] == "static, trained"} == {
        ("stage 1", 0.25), ("stage 1, p > 1/2", 0.25), ("stage 2", 0.5), ("stage 2, p > 1/2", 0.5)}


def test_a_static_exit_is_trained_for_its_depth_alone(tmp_path, monkeypatch):
    """Else the baseline is handicapped by depths that it never takes, or by some other stage 1's flags."""
    called = []
    monkeypatch.setattr(common, "trained", lambda args, *command: called.append(command))
    monkeypatch.setattr(common, "stage_one", lambda args: tmp_path / "s1")
    assert common.one_depth(argparse.Namespace(model="embedded", stage1=()), 3) is None
    name, script, *options = called[0]
    given = dict(zip(options[::2], map(str, options[1::2]), strict=True))  # the last of each counts
    assert (name, script, given["--exit-every"], given["--rank"]) == ("static-3", "distill.py", "3", "64")
    assert given["--teacher"] == str(tmp_path / "s1" / "teacher.jsonl") and given["--steps"] == "3000"
    far = torch.tensor([20.0])  # nats between a layer's read-out and the last one's
    assert distill.log_safe(far, float(given["--kl-factor"]))[0].exp() > 0.99  # so all take the first exit


# ------------------------------------------------------------------------------------------------ runs and answers


def settled(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["study", *map(str, argv)])
    return common.arguments("")


def of_toy(home, monkeypatch, n: int, *more):
    """The settings of a study on the toy, in whose folder the test now stands."""
    monkeypatch.chdir(home)
    return settled(monkeypatch, "--runs", home, *f"--model toy --task arithmetic --max-new-tokens 12 --n {n}".split(),
                   *more)


def test_what_is_complete_is_skipped_and_what_was_begun_goes_on(tmp_path, monkeypatch):
    """Else a killed command starts its trainings anew, or evaluates half of one."""
    called, code = [], 0
    monkeypatch.setattr(common, "call", lambda command: called.append(command[1:]) or code)
    args = settled(monkeypatch, "--runs", tmp_path, "--max-new-tokens", 9, "--no-thinking", "--n", 2,
                   "--rows", 7, "--device", "cpu")
    assert common.trained(args, "new", "distill.py", "--kl-factor", "4") == tmp_path / "new"
    (command,) = called
    assert command[0].endswith("distill.py") and command[-4:] == ["--kl-factor", "4", "--out", str(tmp_path / "new")]
    assert {"--max-new-tokens=9", "--no-thinking"} < set(command)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    common.trained(args, "begun", "rloo.py", "--lam", "1")
    assert called[1][1:] == ["--resume", str(tmp_path / "begun"), "--rows=7", "--no-cuda-graphs", "--device=cpu"]
    code = 2
    with pytest.raises(UserError, match="begun is not complete"):
        common.trained(args, "begun", "rloo.py")
    (tmp_path / "begun" / "complete.json").write_text("{}")
    common.trained(args, "begun", "rloo.py")
    args.train = False
    assert common.trained(args, "new", "rloo.py") is None and len(called) == 3


def test_answers_are_sampled_once_and_anew_for_other_weights(home, monkeypatch):
    """A stale answer would be reported for a run that never gave it."""
    args = of_toy(home, monkeypatch, 3)
    made = []
    monkeypatch.setattr(common, "generate", lambda *a, **k: made.append(k["delta"]) or generate(*a, **k))
    first = common.answers(args, home / "one")
    assert common.answers(args, home / "one") == first and len(made) == 1
    assert first.depth_of_outcome == [2, 4] and "logp_exit" not in first.rows[0]
    common.answers(args, home / "one", delta=1.5)
    common.answers(args, checkpoint(home / "two"))
    assert made == [0.0, 1.5, 0.0]
    assert common.coherence_of(args, first) == common.coherence_of(args, first)
    assert json.loads(common.coherence_file(first.path).read_text())["n"] == 3
    (head := checkpoint(home / "one") / "exit_heads.safetensors").write_bytes(
        (checkpoint(home / "two") / head.name).read_bytes())
    common.answers(args, home / "one")
    assert len(made) == 4 and not common.coherence_file(first.path).exists()
    assert common.about_the_same(args, home / "one")
    with pytest.raises(UserError, match="one has kl_factor 1.0, and this study 4: choose another --runs"):
        common.about_the_same(args, home / "one", kl_factor=4)
    args.max_new_tokens += 1
    with pytest.raises(UserError, match="max_new_tokens"):
        common.about_the_same(args, home / "one")
    args.task = "stories"
    with pytest.raises(UserError, match="another --runs"):
        common.about_the_same(args, home / "one")


def test_answers_are_sampled_as_asked_and_anew_where_it_is_otherwise(home, monkeypatch):
    """Else every table is of temperature 1 and seed 0 whatever it says, the base exits, or exits that are called
    undrawn are drawn."""
    args = of_toy(home, monkeypatch, 2, "--temperature", 0.5, "--seed", 3)
    made = []
    monkeypatch.setattr(common, "generate", lambda *a, **k: made.append(
        [k["temperature"], k["seed"], k.get("depths"), k.get("threshold")]) or generate(*a, **k))
    common.base_answers(args)
    common.undrawn(args, home / "one")
    assert made == [[0.5, (3,), 4, None], [0.5, (3,), None, 0.5]]
    assert common.thresholded(0.3)(None) == {"threshold": 0.3}
    for args.seed, args.temperature in ((4, 0.5), (4, 0.25)):  # of the same problems
        common.base_answers(args)
    assert made[2:] == [[0.5, (4,), 4, None], [0.25, (4,), 4, None]]


def test_another_base_at_the_same_place_is_sampled_anew(home, monkeypatch):
    """A fine-tuned model that was trained again must not be reported by the old one's answers."""
    args = of_toy(home, monkeypatch, 2, "--runs", home / "other")
    first = common.base_answers(args)
    monkeypatch.setattr(common, "base_mark", lambda *about: "of other weights")
    made = []
    monkeypatch.setattr(common, "generate", lambda *a, **k: made.append(1) or generate(*a, **k))
    assert common.base_answers(args) == first and made  # the weights are, in truth, the same
    assert common.base_answers(args) == first and len(made) == 1
    path = home / "toy" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("{{ m.content }}", "{{ m.content }}!"))  # of the chat template
    again = common.with_problems(args)
    assert common.base_answers(again).rows[0]["prompt_ids"] != first.rows[0]["prompt_ids"] and len(made) == 2


def test_stage_2_of_another_stage_1_is_refused(home, monkeypatch):
    """Else a stage 1 that was made anew stands beside the old one's stage 2, as its start."""
    args = of_toy(home, monkeypatch, 2, "--no-train")
    lam = config(home / "two")["lam"]
    assert common.stage_two(args, "two", lam, 0, home / "one") == home / "two"
    monkeypatch.setattr(common, "stage_one", lambda args: home / "one")
    folder = baselines.closed_start(args)
    assert baselines.closed_start(args) == folder
    heads = next((home / "one").glob("step-*")) / "exit_heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="two was trained from another one than the one there now"):
        common.stage_two(args, "two", lam, 0, home / "one")
    with pytest.raises(UserError, match="full was made of another one than the one there now"):
        baselines.closed_start(args)


def test_the_study_asks_held_out_problems(tmp_path, monkeypatch):
    """On problems that were trained on, every row of every table is too good."""
    args = settled(monkeypatch, "--runs", tmp_path, "--n", 5, "--seed", 2)
    for some, task in ((args, "arithmetic"), (common.on_task(args, "stories"), "stories")):
        assert [p.id for p in some.problems] == [p.id for p in tasks.load(task, "test", n=5, seed=2)]


def test_plain_rl_pays_nothing_for_depth_and_a_lower_kappa_is_a_quarter(monkeypatch):
    """Else other rewards, or another factor, stand under the names of the tables."""
    monkeypatch.setattr(common, "stage_two", lambda args, *given: given)
    monkeypatch.setattr(common, "stage_one", lambda args: "s1")
    monkeypatch.setattr(common, "kl_run", lambda args, kappa: f"kl-{kappa:g}")
    monkeypatch.setattr(baselines, "closed_start", lambda args: "full")
    monkeypatch.setattr(common.runs, "read_config", lambda run: {"args": {"kl_factor": 16}})
    assert baselines.plain_rl(None, 3) == ("full-3", 0.0, 3, "full")
    assert common.lower_kappa(argparse.Namespace(seeds=2)) == (
        4, "kl-4", [(f"rl-0.1-{seed}-kl-4", 0.1, seed, "kl-4") for seed in (0, 1)])


def test_what_a_run_is_named_for_outweighs_the_users_flags(tmp_path, monkeypatch):
    """Else --stage1 "--kl-factor 3" would train every row of Table 1 at 3. All rows learn from s1's base responses."""
    args = settled(monkeypatch, "--runs", tmp_path, "--n", 2, "--stage1", "--kl-factor 3 --steps 7",
                   "--stage2", "--lam 9 --seed 9 --steps 7")
    called = []
    monkeypatch.setattr(common, "trained", lambda args, name, script, *options: called.append(list(map(str, options)))
                        or tmp_path / name)
    monkeypatch.setattr(common, "about_the_same", lambda args, folder, **named: folder)
    monkeypatch.setattr(common.runs, "read_config", lambda folder: {"args": {"kl_factor": 4}})
    assert common.kl_run(args, 4) == tmp_path / "s1" and common.kl_run(args, 2) == tmp_path / "kl-2"
    _, *called = called
    common.stage_two(args, "rl-0.3-1", 0.3, 1, tmp_path)

    def last(options, flag):
        return options[max(i for i, text in enumerate(options) if text == flag) + 1]

    assert [last(options, "--kl-factor") for options in called[:2]] == ["4", "2"] and last(called[1], "--steps") == "7"
    assert last(called[1], "--teacher") == str(tmp_path / "s1" / "teacher.jsonl")
    assert [last(called[2], flag) for flag in ("--lam", "--seed", "--steps")] == ["0.3", "1", "7"]
    args.model = "another"
    common.stage_one(args)
    common.stage_one(args, "-stories")  # of the other task: at the same factor, or both are compared at two
    assert [last(options, "--kl-factor") for options in called[3:]] == ["1", "1"]
    (tmp_path / "s1").mkdir()
    (tmp_path / "s1" / "config.json").touch()  # trained by hand, at what read_config says
    common.stage_one(args, "-stories")
    assert last(called[-1], "--kl-factor") == "4.0"
    common.kl_run(args, 0.12345678)
    assert last(called[-1], "--kl-factor") == "0.12345678"  # cut to six digits its run would be refused as another's


@pytest.mark.parametrize("command", [baselines, crossdomain, fig2, fronts, table1, tokens])
def test_where_nothing_has_been_trained_nothing_is_written(command, tmp_path, monkeypatch):
    """With --no-train in a fresh clone the record would be replaced by empty tables."""
    monkeypatch.setattr(sys, "argv", ["study", *"--no-train --n 2 --runs".split(), str(tmp_path / "runs"), "--out",
                                      str(tmp_path)])
    command.main()
    assert not list(tmp_path.rglob("*.json"))


def test_what_stage_2_wins_back_is_the_mean_of_its_seeds_over_the_same_problems(tmp_path, monkeypatch):
    """One seed's luck, or a difference from another start, would be taken for a recovery."""
    right = {"base": [1, 1, 1, 0], "s1": [1] * 4, "kl-4": [0, 1, 0, 0], "rl-0.1-0-kl-4": [1, 1, 0, 0],
             "rl-0.1-2-kl-4": [1, 0, 1, 1], "kl-4 cut": [1, 1, 1, 1], "rl-0.1-0-kl-4 cut": [1, 1, 1, 0],
             "rl-0.1-2-kl-4 cut": [0, 1, 1, 0]}
    monkeypatch.setattr(common, "stage_one", lambda args: tmp_path / "s1")
    monkeypatch.setattr(common, "kl_run", lambda args, kappa: tmp_path / f"kl-{kappa:g}")
    monkeypatch.setattr(common, "stage_two", lambda args, name, lam, seed, start:
                        seed != 1 and start.name == "kl-4" and tmp_path / name)
    monkeypatch.setattr(common, "base_answers", lambda args: "base")
    monkeypatch.setattr(fronts, "answers", lambda args, run: run.name)
    monkeypatch.setattr(fronts, "undrawn", lambda args, run: f"{run.name} cut")
    for module in (common, fronts):
        monkeypatch.setattr(module, "correct", right.get)
    monkeypatch.setattr(fronts, "point", lambda args, answered, **about: {"average_compute": len(answered), **about})
    monkeypatch.setattr(common.runs, "read_config", lambda run: {"args": {"kl_factor": 16} if run.name == "s1" else
                                                                 {"seed": int(run.name.split("-")[2])}})
    rows = []
    found = fronts.from_lower_kappa(argparse.Namespace(seeds=3), rows)
    assert [row["seed"] for row in rows] == [0, 2] and found["seeds"] == 2
    for name, wanted in (("drawn", [0.625, 0.375, -0.125]), ("thresholded", [0.625, -0.375, -0.125])):
        got = found[name]
        assert [got["accuracy"], got["change_from_start"][0], got["change_from_base"][0]] == wanted
    assert fronts.from_lower_kappa(argparse.Namespace(seeds=0), rows) is None


def test_a_figure_mixes_no_problems(tmp_path, capsys):
    """Simpler exits over 100 problems beside a base over 200: a distance that nobody measured."""
    (tmp_path / "data").mkdir()
    ours = {"model": "m", "task": "t", "problems": "those", "temperature": 1.0}
    (tmp_path / "data" / "baselines.json").write_text(json.dumps({**ours, "points": [1, 2]}))
    args = argparse.Namespace(out=tmp_path)
    assert fronts.made(args, ours, "baselines", "points") == [1, 2] and fronts.made(args, ours, "table1", "rows") == []
    assert not capsys.readouterr().err
    assert fronts.made(args, {**ours, "problems": "others"}, "baselines", "points") == []
    assert "or another temperature: left out" in capsys.readouterr().err


def test_a_study_of_another_model_does_not_overwrite_what_is_there(tmp_path, monkeypatch):
    """Without an --out of its own it would replace the embedded model's record."""
    args = settled(monkeypatch, "--out", tmp_path, "--n", 2)
    common.save(args, "table1", "table1", rows=[1])
    common.save(args, "table1", "table1", rows=[2])
    args.task = "stories"
    with pytest.raises(UserError, match="--out of its own"):
        common.save(args, "table1", "table1", rows=[3])
    assert json.loads((tmp_path / "data" / "table1.json").read_text())["rows"] == [2]


def test_a_point_compares_with_the_base_over_the_same_problems(home, monkeypatch):
    """The base against itself differs by nothing, as far as three problems can tell; a static exit at half of the
    layers has half of the compute."""
    args = of_toy(home, monkeypatch, 3)
    itself = common.point(args, common.base_answers(args))
    assert (itself["accuracy_change"], itself["length_change_half"], itself["average_compute"]) == (0, 0, 1)
    assert itself["accuracy_change_half"] == pytest.approx(1.96 * 2**0.5 / 5, rel=1e-4)  # one won, one lost, of 5
    half = common.point(args, common.answers(args, (2,), "static 2", baselines.static(2)), rule="static")
    assert half["average_compute"] == 0.5 and half["average_compute_half"] == 0 and half["rule"] == "static"
    change = half["total_compute"] - itself["total_compute"]
    assert half["total_compute_change"] == pytest.approx(change)


def test_the_interval_of_compute_is_that_of_a_ratio_of_sums(monkeypatch):
    """Else it is of something else than 95%, or responses of one token weigh as much as long ones. By hand: of 1 and 4
    tokens at depths 2 and 8 of 8 the ratio is (1/4 + 4) / 5 = 0.85, which they are 0.6 below and above."""
    rows = [{"depths": [depth] * length, "correct": 0, "flexible": 0, "finished": 1} for depth, length in (
        (2, 1), (8, 4))]
    answered = common.Answers(rows, [2, 8], None)
    monkeypatch.setattr(common, "base_answers", lambda args: answered)
    found = common.point(None, answered)
    assert found["average_compute"] == pytest.approx(0.85)
    assert found["average_compute_half"] == pytest.approx(1.96 * (0.6**2 + 0.6**2) ** 0.5 / 5)


def test_plain_rl_starts_from_stage_1s_adapters_with_exits_that_never_open(home, monkeypatch):
    """An exit now and then, and it is no plain RL; other adapters, and it is not the exits that are compared."""
    args = of_toy(home, monkeypatch, 2)
    monkeypatch.setattr(common, "stage_one", lambda args: home / "one")
    folder = baselines.closed_start(args)
    policy, s1 = (load_policy(Transformer.from_pretrained(home / "toy"), where) for where in (folder, home / "one"))
    assert policy.exits == s1.exits
    assert all(torch.equal(a.lora_B, b.lora_B) and (a.lora_B != 0).any()
               for a, b in zip(policy.adapters, s1.adapters, strict=True))
    drawn = generate(policy, PROMPTS, max_new_tokens=5, eos_ids=[])
    assert {d for r in drawn for d in r.depths} == {4} and min(x for r in drawn for x in r.logp_exit) > -1e-40


def test_new_heads_are_fitted_to_what_the_old_ones_read(home, monkeypatch):
    """Fitted to other streams or targets their loss would not fall; not put in place, all rows would be the old
    ones'."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(heads, "LR", 0.01)
    monkeypatch.setattr(heads, "correct", lambda answered: [float(sum(row["depths"])) for row in answered.rows])
    given = "--model toy --task arithmetic --runs runs --n 20 --max-new-tokens 12 --widths 0 5 --out docs".split()
    monkeypatch.setattr(sys, "argv", ["heads", "two", *given])
    with pytest.raises(UserError, match="a run of rloo.py, not of distill.py"):
        heads.main()
    monkeypatch.setattr(sys, "argv", ["heads", "one", *given])
    path = home / "one" / "config.json"
    ours = path.read_text()
    path.write_text(ours.replace("kl_factor", "factor"))
    with pytest.raises(UserError, match="'kl_factor' is missing"):
        heads.main()
    path.write_text(ours)
    results = []
    for epochs in (1, 60):
        monkeypatch.setattr(heads, "EPOCHS", epochs)
        heads.main()
        data = json.loads((home / "docs" / "data" / "heads.json").read_text())
        trained, *fitted = data["rows"]
        results.append([row["exit_cross_entropy"] for row in fitted])
    ended = json.loads((home / "one" / "complete.json").read_text())
    assert {name: trained[name] for name in ("token_kl", "exit_cross_entropy", "intact")} == {
        name: pytest.approx(ended[name], rel=1e-4) for name in ("token_kl", "exit_cross_entropy", "intact")}
    assert all(late < 0.6 * early for early, late in zip(*results, strict=True))
    path.write_text(ours.replace('"forward_kl": false', '"forward_kl": true'))
    heads.main()  # measures in the direction that the run was trained in
    turned = json.loads((home / "docs" / "data" / "heads.json").read_text())["rows"][0]
    assert turned["exit_cross_entropy"] == trained["exit_cross_entropy"] and turned["token_kl"] != trained["token_kl"]
    path.write_text(ours.replace('"student_lens": false', '"student_lens": true'))
    heads.main()  # fits to the target that the run was trained on, and measures by it
    asked, *refitted = json.loads((home / "docs" / "data" / "heads.json").read_text())["rows"]
    assert asked["exit_cross_entropy"] != trained["exit_cross_entropy"]
    assert [row["total_compute"] for row in refitted] != [row["total_compute"] for row in fitted]
    path.write_text(ours)
    assert data["responses"] == 6  # those that it was trained on: the other 3 are what it is measured on
    assert [row["width"] for row in data["rows"]] == [None, 0, 5]
    assert fitted[0]["exit_cross_entropy"] != fitted[1]["exit_cross_entropy"]
    assert len({row["average_compute"] for row in data["rows"]}) == 3
    for above, row in zip(data["rows"], fitted, strict=False):  # the toy is never right: layers in place of accuracy
        assert row["gained"] == pytest.approx(4 * (row["total_compute"] - above["total_compute"])) != 0
    assert "gained" not in trained and data["run"] == "one"
    text = "\n".join(write.heads(data))
    assert "| 256 hidden units, as trained |" in text and "| linear, fitted |" in text


def test_heads_are_fitted_to_streams_frozen_at_drawn_depths():
    """At full depth a head would be fitted to what no token that left before it ever shows."""
    policy = toy_policy(1).double()
    (r,) = said = responses([[5, 6, 7]], [[11, 12, 13, 14, 15, 16, 17]], [[L] * 7])
    h, p_safe, depths = heads.streams(policy, said, 2.0, 0, 1, distill.base_target)
    assert len(set(depths.tolist())) == 3 and h.shape == (7, 2, 20) and p_safe.shape == (7, 2)
    streams = reference(policy).streams([*r.prompt_ids, *r.token_ids[:-1]], [L, L, *depths.tolist()])
    for e, depth in enumerate(policy.exits):
        assert_close(h[:, e], streams[depth][2:])


def test_checkpoints_of_an_interruption_are_not_shown(tmp_path):
    """Else two seeds have no steps in common."""
    (tmp_path / "config.json").write_text('{"stage": "rloo", "args": {"save_every": 30}}')
    for step in (30, 47, 60, 70):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert list(fig2.on_schedule(tmp_path)) == [30, 60, 70]


def test_total_variation_is_half_of_the_sum():
    """By hand."""
    assert table1.total_variation([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]) == 0.25


def test_kinds_of_tokens():
    """A digit copied and a digit computed must not fall into one row; nor a thought that was cut among the answers."""
    pieces = ["<think>", "\n", "First", " An", "ne", " gives", " the", " eggs", ":", " ", "1", "7", "+", "2", "=", "1",
              "9", "\n", "</think>", "\n\n", "\\boxed", "{", "1", "9", "}", "<|im_end|>"]
    wanted = ("control blank ordinal name rest word function word punctuation blank number number operator number "
              "operator result result blank control blank word punctuation boxed boxed punctuation control").split()
    assert kinds.kinds_of(pieces) == wanted
    assert kinds.kinds_of(["x", "_", "max", "_new"]) == ["word", "punctuation", "word", "punctuation"]
    assert kinds.kinds_of(["</think>", "<｜end▁of▁sentence｜>"]) == ["control", "control"]  # R1-Distill's
    cut = [{"token_ids": ids, "depths": [2] * len(ids), "prompt_ids": prompt} for ids, prompt in (
        (range(4), []), (range(20, 26), []), (range(2, 5), [7]))]
    tokenizer = argparse.Namespace(pieces=lambda ids: [pieces[i] for i in ids], think_open=lambda prompt: prompt == [7])
    parts = {k["part"]: k["tokens"] for k in kinds.by_kind(cut, [2, 4], tokenizer) if k["kind"] == "all"}
    assert parts == {"all": 13, "thoughts": 7, "answer": 6}
    cut[1]["depths"] = [2, 4] * 3
    (row,) = (k for k in kinds.by_kind(cut, [2, 4], tokenizer) if k["part"] == "answer" and k["kind"] == "all")
    assert (row["exit_rate"], row["average_compute"]) == (0.5, 0.75)


# ------------------------------------------------------------------------------------------------------- the text


def test_the_text_says_what_the_json_says_and_leaves_out_what_was_not_run(tmp_path, monkeypatch):
    """A table without its run is a fake; a figure that differs from its data is an error; and what others wrote around
    the study has to stay."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "results.md"
    path.write_text(f"before\n{write.BEGIN}old\n{write.END}after\n")
    cell = {"n": 600, "accuracy": 0.6133, "accuracy_low": 0.573, "accuracy_high": 0.651, "accuracy_change": -0.0267,
            "accuracy_change_half": 0.011, "average_compute": 0.7234, "exit_rate": 0.4321, "finished": 0.998}
    (tmp_path / "data" / "crossdomain.json").write_text(json.dumps({
        "command": "python -m study.crossdomain", "model": "embedded", "task": "arithmetic", "n": 600,
        "temperature": 1.0, "cells": [{"stage": "base", "tested": "stories", **cell},
                                      {"stage": "stage 1", "trained": "arithmetic", "tested": "stories", **cell,
                                       "thresholded": {**cell, "accuracy": 0.7}}]}))
    monkeypatch.setattr(sys, "argv", ["write", "--out", str(tmp_path)])
    for _ in range(2):
        write.main()
        text = path.read_text()
    assert text.startswith("before\n" + write.BEGIN) and text.endswith(write.END + "after\n") and "old" not in text
    assert ("| stage 1 | arithmetic | stories | 61.3% (57–65) | −2.7 ± 1.1 | 72.3% | 43.2% | 99.8% | 70.0% (57–65) |"
            in text)
    assert "Table 1" not in text and "600 held-out problems" in text
    (tmp_path / "data" / "heads.json").write_text('{"command": "python -m study.heads"}')
    with pytest.raises(UserError, match="heads.json has no 'rows'.*again.*: python -m study.heads"):
        write.main()
    (tmp_path / "data" / "heads.json").unlink()
    path.write_text("no marks")
    with pytest.raises(UserError, match="must stand in it"):
        write.main()


def test_stage_2_is_compared_with_the_weights_it_began_with():
    """Else what it adds, undrawn, is read off another calibration."""
    assert [baselines.start_of(name) for name in ("stage 1", "stage 2", "stage 1 at κ = 4", "stage 2 from κ = 4")] == [
        "stage 1", "stage 1", "stage 1 at κ = 4", "stage 1 at κ = 4"]


@pytest.mark.parametrize("change, half, wanted", [(0.03, 0.01, "better"), (-0.03, 0.01, "worse"),
                                                  (0.01, 0.03, "no significant difference")])
def test_the_verdict_follows_the_interval(change, half, wanted):
    """A text that says 'beats' whatever was measured."""
    comparison = {"of": "stage 2", "rule": "plain RL", "weights": "plain RL", "compute": 0.7, "accuracy": 0.6,
                  "other": 0.6 - change, "change": change, "half": half}
    text = "\n".join(write.baselines({"name": "baselines-300-steps", "command": "c", "model": "m", "task": "t", "n": 9,
                                      "temperature": 1.0, "points": [], "comparisons": [comparison],
                                      "runs": {"stage 2": 5, "plain RL": 5}}))
    assert f"points against reinforcement learning without exits, {wanted}." in text
    assert text.startswith("### Baselines at equal compute: 300 steps\n") and "data/baselines-300-steps.json" in text


def test_the_monitors_table_reads_the_regime_that_is_the_models_own(tmp_path, monkeypatch):
    """Base and exits side by side: full depth for one, learned for the other, and the claim that monitor.py makes."""
    def rows(own, value, **more):
        keys = [key for _, key, _ in write.EVALS if key[:7] not in ("E1 gain", "E4 lost") and key != "E1 chain random"]
        found = {f"{key} {own}>{own}" if key == "E2 aoc" else f"{key} {own}": {"value": value, **more} for key in keys}
        return found | {"E1 chance full": {"value": 0.5}, "E1 chance learned": {"value": 0.05}}

    monkeypatch.setattr(monitor, "VERDICTS", str(tmp_path / "{}.json"))
    write_json(tmp_path / "arithmetic.json", {"verdicts": {"E2 aoc": "", "E4": "not validated", "E3 NLDD": "failed"}})
    learned = rows("learned", 0.25, difference=-0.5, d_low=-0.625, d_high=-0.25)
    learned |= {"E1 gain, learned over full": {"value": 0.1, "low": -0.1, "high": 0.3}, "E4 lost 4": {"value": 7.0},
                "E1 chain, learned over random": {"value": 0.5, "low": 0.3, "high": 0.7}, "E4 lost 12": {"value": 8.0},
                "E1 chain cap-2": {"value": 0.14}, "E1 chain cap-4": {"value": 0.16}}
    data = {"command": "python monitor.py base runs/s1", "name": "monitor-half", "about": {"model": "m"}, "results": {
        "base": rows("full", 0.75), "runs/study/s1": learned | rows("full", 0.9)}}
    text = "\n".join(write.monitor(data))
    assert "`python monitor.py base runs/s1`: m, arithmetic" in text and "text?\n" in text
    data["about"] |= {"task": "stories", "threshold": 0.5}
    assert "text, on stories with exits at p > 0.5?\n" in "\n".join(write.monitor(data))
    assert "| E1 accuracy with the chain | 75.0% | 25.0%, −50.0 (−62.5 to −25.0) |" in text
    assert "| E2 area over the early-answering curve | 0.75 | 0.25, −0.50 (−0.62 to −0.25) |" in text
    assert "exits at random" not in text  # of none of them
    assert "half of the accuracy over a guess, with the chain | none | 4 |" in text
    assert "(figures/monitor-half.png)" in text
    assert "s1: E1: with the chain 25.0%, base 75.0%" in text and "not shown that the uplift grew" in text
    assert "that it is above that at full depth" in text and "beat random" not in text
    assert "at full depth |  | 10.0% (−10.0 to 30.0) |" in text and "first exit (not validated) |  | 7.00 |" in text
    assert "(2: it turns round) (failed) | 0.75" in text
    data["results"]["runs/other/s1"] = learned | rows("full", 0.9)  # two of one name: neither is dropped
    assert "|  | base | runs/study/s1 | runs/other/s1 |" in "\n".join(write.monitor(data))


def test_evaluations_are_paired_and_seeds_averaged(tmp_path):
    """Else runs of other problems or exits are mixed, or a mean of seeds has the interval of one."""
    solved = {"base": (1, 1, 0, 0), "stage 2 a": (1, 0, 1, 0), "stage 2 b": (1, 1, 1, 0), "stage 2 c": (0, 0, 0, 0)}
    named = {"base": None, "stage 2 a": os.path.abspath("runs/rl-0.1-0"), "stage 2 b": "runs/rl-0.1-1",
             "stage 2 c": "runs/rl-0.1-0-kl-4"}

    def wrote(name, models, seed=0, threshold=None, **given):
        metrics = [{"name": model, "run": named[model], "accuracy": sum(solved[model]) / 4, "average_compute": 0.5,
                    "length": 3.0, "finished": 1.0} for model in models]
        write_json(tmp_path / name / "evaluation.json", {"metrics": metrics, "args": {
            "task": "arithmetic", "n": 4, "seed": seed, "temperature": 1.0, "threshold": threshold, "delta": 0.0,
            **given}})
        (tmp_path / name / "completions.jsonl").write_text("".join(
            json.dumps({"model": model, "id": f"{seed}/{i}", "correct": bool(x)}) + "\n"
            for model in models for i, x in enumerate(solved[model])))
        return tmp_path / name

    for name in "xyz":
        (tmp_path / name).mkdir()
    assert evaluations.kind("r/rl-1e-05-0-kl-4") == "r/rl-1e-05-*-kl-4" and evaluations.kind("full-12") == "full-*"
    assert evaluations.kind(".") == "."  # evaluated from within its folder
    rows = evaluations.rows([wrote("x", ("base", "stage 2 a")), wrote("y", ("base", "stage 2 b", "stage 2 c")),
                             wrote("z", ("base", "stage 2 b"), threshold=0.5)])
    assert [(row["run"], row["seeds"], row["threshold"]) for row in rows] == [
        ("base", 1, 0.5), ("runs/rl-0.1-*", 1, 0.5), ("base", 1, None), ("runs/rl-0.1-*", 2, None),
        ("runs/rl-0.1-*-kl-4", 1, None)]
    assert (rows[3]["accuracy_change"], rows[3]["accuracy_change_half"]) == paired(solved["base"], (1, 0.5, 1, 0))
    assert rows[3]["accuracy"] == 0.625 and rows[4]["accuracy_change"] == -0.5
    more, = (row["n"] for row in evaluations.rows([wrote("z", ("base",), n=5000)]))
    assert more == 4  # all that there are, where more were asked for
    text = "\n".join(write.evaluations({"name": "evaluations", "rows": rows}))
    assert "| 4, seed 0 | 1 | drawn | runs/rl-0.1-* | 2 | 62.5% | +12.5 ± " in text
    assert "| p > 0.5 | base | 1 | 50.0% |  |" in text
    rows[0] |= {"model": "a/b", "thinking": False, "delta": -1.0}
    text = "\n".join(write.evaluations({"name": "evaluations", "rows": rows}))
    assert "On arithmetic, b, without thinking:" in text and "| p > 0.5, δ = -1 | base |" in text
    wrote("z", ("base", "stage 2 b"), seed=1)
    saved = json.loads((tmp_path / "z" / "evaluation.json").read_text())
    write_json(tmp_path / "z" / "evaluation.json", saved | {"args": saved["args"] | {"seed": 0}})
    with pytest.raises(UserError, match="other problems|other answers of base"):
        evaluations.rows([tmp_path / "x", tmp_path / "z"])
    wrote("z", ("base", "stage 2 a"), thinking=False)  # another setting, in rows of its own
    assert len(evaluations.rows([tmp_path / "x", tmp_path / "z"])) == 4
    solved["base"] = (0, 0, 0, 0)
    with pytest.raises(UserError, match="z has other answers of base"):  # of another model of that name, or version
        evaluations.rows([tmp_path / "x", wrote("z", ("base", "stage 2 a"))])


def test_the_deciding_token_is_the_one_before_the_eos():
    """Else the depth of a label, or of the eos, is told as that of the answer; or other problems are compared."""
    def answers(*found):
        return {str(i): {"depths": depths, "finished": depths[-1] != 7, "correct": correct}
                for i, (depths, correct) in enumerate(found)}

    own = {"base": answers(*[([8, 8, 8], True)] * 3, ([8, 8, 8], False), ([8, 8, 8], True)),
           "m": answers(([8, 1, 3], True), ([8, 1, 3], False), ([1, 4, 8], True), ([1, 8, 1], False),
                        ([1, 8, 7], True))}
    full = {"m": answers(*[([8, 8, 8], True)] * 4, ([8, 8, 8], False))}
    one, half, deep = deciding.rows(own, full)  # the last answer is cut short: no token of it decides
    assert (one["n"], one["share"], one["own"], one["full"], one["base"]) == (2, 0.5, 0.5, 1, 1)
    assert (half["n"], half["own"], deep["n"], deep["own"], deep["base"]) == (1, 1, 1, 0, 0)
    assert one["mean_depth"] == 3.5
    with pytest.raises(UserError, match="the same problems"):
        deciding.rows(own, {"m": answers(([8, 8, 8], True))})
    with pytest.raises(UserError, match="no finished answer"):
        deciding.rows({"base": answers(([8, 8], True)), "m": answers(([1, 7], True))}, {"m": answers(([8, 8], True))})


@pytest.mark.parametrize("rows, naming", [
    ([{"step": 0, "id": "a", "depths": [1], "finished": True, "correct": True}], "completions.jsonl:1: field 'model'"),
    ([{"model": "base"}], "completions.jsonl:1: field 'id'"),
    ([], "holds no answers of the base"), ([{"model": "base", "id": "a", "depths": [8]}], "of no run"),
])
def test_what_has_no_answers_of_a_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys, rows, naming):
    """Else a stage-2 run in place of an evaluation, or one that was stopped, ends in a traceback under a header."""
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["deciding", str(tmp_path), str(tmp_path)])
    with pytest.raises(UserError, match=f"{tmp_path}.*{naming}"):
        deciding.main()
    assert not capsys.readouterr().out


def test_figures_are_small(tmp_path):
    """Pages that load at once, and a repository that stays light."""
    args = argparse.Namespace(out=tmp_path)
    table1.draw(args, {"distributions": [{"name": name, "depths": [1, 2, 3], "target": [0.2, 0.3, 0.5],
                                          "learned": [0.3, 0.3, 0.4]} for name in ("1", "4", "16")]}, "fig4")
    sizes = [path.stat().st_size for folder in (tmp_path, ROOT / "docs") for path in folder.rglob("*.png")]
    assert len(sizes) > 1 and 2000 < min(sizes) and max(sizes) < 150_000


@pytest.mark.parametrize("folder", ["docs", "docs/short", "docs/stories", "docs/smollm2", "docs/smollm2-gsm8k"])
def test_the_docs_say_what_their_data_do(folder):
    """Else a table of results.md is of older data, or a number in it was typed."""
    text = (ROOT / folder / "results.md").read_text(encoding="utf-8")
    assert text.split(write.BEGIN)[1].split(write.END)[0] == write.written(ROOT / folder)
