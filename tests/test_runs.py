"""Run folders as users treat them: killed, copied, moved, continued, compared, started twice."""

import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import optim
import runs
from data import tasks
from data.text import Tokenizer
from exits import Response
from tests import kill
from tests.commands import RL, ROOT, SMALL, config, forked, fresh, lines, run, running, toy_checkpoint
from tests.toys import edit

STAGES = [("distill.py", "one"), ("rloo.py", "two")]


def refused(*command, home, naming: str) -> str:
    done = run(*command, cwd=home, ok=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and naming in last, done.stderr
    return last


# killed and continued

@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    home = tmp_path_factory.mktemp("unbroken")
    return home, kill.prepare(home)


@pytest.mark.parametrize("name, operation", [
    ("one", "half a write to one/teacher.jsonl"), ("one", "replace one/.partial-complete.json"),
    ("two", "half a write to two/metrics.jsonl"), ("two", "half of two/.partial-000004/optimizer.safetensors"),
    ("two", "rmdir two/.partial-000003"),
])
def test_a_run_killed_in_the_middle_of_writing_comes_to_the_same_bits(unbroken, name, operation):
    """Else a kill loses hours, or what follows it is another run. python tests/kill.py tries every operation."""
    home, commands = unbroken
    operations = (home / f"{name}.trace").read_text().splitlines()
    at = max(i for i, what in enumerate(operations, start=1) if what == operation)
    assert kill.broken_at(commands[name], name, home, at) == []


def test_a_run_killed_at_any_moment_comes_to_the_same_bits(unbroken):
    """Else only the kills that somebody thought of are survived."""
    home, commands = unbroken
    assert kill.broken_after(commands["two"], "two", home, 0.4) == []


@pytest.mark.parametrize("script, name", STAGES)
def test_a_run_without_its_last_file_completes(home, script, name):
    """Else one killed between its last checkpoint and complete.json can never be continued."""
    done = home / name / "complete.json"
    before = json.loads(done.read_text())
    done.unlink()
    run(script, "--resume", name, cwd=home)
    assert json.loads(done.read_text()) == before


@pytest.mark.parametrize("script", ["distill.py", "rloo.py"])
def test_a_checkpoint_before_any_gradient_goes_on(home, script):
    """Else NaN in step 0 leaves a checkpoint without moments, which can't be resumed. It is counted, and written as
    null: NaN is no JSON."""
    flags = ("--model", "toy", *SMALL) if script == "distill.py" else ("--init", "one", *RL)
    done = run(script, *flags[:-1], 1, "--save-every", 1, "--out", "nan", cwd=home, before=break_a_gradient)
    assert "not finite (1 so far)" in done.stderr
    run(script, "--resume", "nan", "--steps", 2, cwd=home)
    first, second = (home / "nan" / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in first and json.loads(first)["grad_norm"] is None
    assert [json.loads(line)["skipped"] for line in (first, second)] == [1, 1]
    json.loads((home / "nan" / "complete.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def break_a_gradient():
    import distill
    whole, step = torch.nn.utils.clip_grad_norm_, distill.train_step

    def broken(params, most):
        params[0].grad[:] = torch.nan
        return whole(params, most)

    torch.nn.utils.clip_grad_norm_ = broken
    distill.train_step = lambda *args: {**step(*args), "token_kl": torch.nan}


def test_gradients_that_stay_broken_end_the_run_and_name_a_checkpoint_only_where_there_is_one(home):
    """Else a run goes on for hours without learning, or sends its user to a folder that isn't there."""
    done = run("distill.py", "--model", "toy", *SMALL[:-1], 9, "--out", "nan", cwd=home, ok=False,
               before=break_a_gradient)
    assert done.returncode == 2 and "5 gradients in a row" in done.stderr and "--resume" not in done.stderr
    done = run("distill.py", "--model", "toy", *SMALL[:-1], 9, "--save-every", 2, "--out", "saved", cwd=home, ok=False,
               before=break_a_gradient)
    assert "or --resume saved with a lower --lr" in done.stderr and (home / "saved" / "step-000004").exists()


def test_a_signal_while_the_bar_is_written_stops_no_step(monkeypatch, capfd):
    """Else Python's "reentrant call" ends the run in a traceback, and the step is lost."""
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(runs.Run, "in_steps", True)
    monkeypatch.setattr(runs.Run, "stop_signal", 0)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Busy())
        runs.on_signal(signal.SIGTERM, None)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert runs.Run.stop_signal == signal.SIGTERM and "stopping when this step is done" in capfd.readouterr().err


@pytest.mark.parametrize("number", runs.STOPPING)
def test_a_signal_saves_the_step_and_names_the_run(home, number):
    """Else Ctrl-C, a cluster's SIGTERM or a closed terminal loses what came after the last checkpoint, and doesn't say
    how to go on."""
    with running("rloo.py", *RL[:-1], 5000, "--init", "one", "--out", "long run", cwd=home) as process:
        wait_for(home / "long run" / "metrics.jsonl", process)
        os.kill(process.pid, number)
        process.join(60)
    said = (home / "log.err").read_text().splitlines()[-1]
    assert process.exitcode == 128 + number and said == "stopped; python rloo.py --resume 'long run' goes on"
    assert saved_at_its_last_step(home / "long run")


def unread():
    """Writes to a pipe that nobody reads once there are metrics, as tee does, which Ctrl-C ends first."""
    read, write = os.pipe()
    os.dup2(write, sys.stderr.fileno())

    def close():
        while not Path("piped", "metrics.jsonl").exists():
            time.sleep(0.01)
        os.close(read)
        os.kill(os.getpid(), signal.SIGINT)

    os.close(write)
    threading.Thread(target=close, daemon=True).start()


def test_a_reader_that_ends_costs_no_step(home):
    """Else Ctrl-C under `2>&1 | tee log` loses what came after the last checkpoint, without a word."""
    with running("rloo.py", *RL[:-1], 5000, "--init", "one", "--out", "piped", cwd=home, before=unread) as process:
        process.join(60)
    assert process.exitcode and saved_at_its_last_step(home / "piped")


def test_a_second_signal_ends_a_step_at_once(home):
    """Else a step that takes minutes, or for ever, can't be interrupted."""
    with running("rloo.py", *RL, "--init", "one", "--out", "slow", cwd=home, before=endless_steps) as process:
        wait_for(home / "slow" / ".in-step", process)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert process.exitcode is None
        os.kill(process.pid, signal.SIGINT)
        process.join(10)
    assert process.exitcode == -signal.SIGINT


def in_a_terminal():
    """Stands in a terminal of its own, which closes as soon as there are metrics."""
    os.setsid()
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(slave, stream.fileno())

    def read():
        while not Path("hung", "metrics.jsonl").exists():
            if select.select([master], [], [], 0.01)[0]:
                os.read(master, 4096)
        os.close(master)

    threading.Thread(target=read, daemon=True).start()


def test_a_terminal_that_closes_costs_no_step(home):
    """Else an hour is lost with a connection, or the message that says so is an error, since nobody can be told."""
    command = ("rloo.py", *RL[:-1], 5000, "--init", "one", "--out", "hung")
    with running(*command, cwd=home, before=in_a_terminal) as process:
        process.join(60)
    assert process.exitcode == 128 + signal.SIGHUP and saved_at_its_last_step(home / "hung")


def endless_steps():
    import rloo

    def endless(*args, **options):
        (runs.Run.current / ".in-step").touch()
        time.sleep(60)

    rloo.accumulate_gradient = endless


def saved_at_its_last_step(folder) -> bool:
    steps = len(lines(folder / "metrics.jsonl"))
    return (folder / f"step-{steps:06d}").exists()


def wait_for(path, process):
    while not path.exists():
        assert process.exitcode is None, "it ended early"
        time.sleep(0.005)


def test_a_damaged_log_is_named_and_one_cut_short_is_mended(home):
    """Else a resumed run dies on a line, or reads a gigabyte into memory to find it."""
    (home / "two" / "complete.json").unlink()
    with open(home / "two" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "stale": 1}\n{"step": 8, "st')
    run("rloo.py", "--resume", "two", cwd=home)
    assert [row["step"] for row in lines(home / "two" / "metrics.jsonl")] == [0, 1]
    (home / "two" / "complete.json").unlink()
    text = (home / "two" / "completions.jsonl").read_text()
    (home / "two" / "completions.jsonl").write_text("{}\n" + text)
    refused("rloo.py", "--resume", "two", home=home, naming="completions.jsonl:1")


def test_as_many_checkpoints_stay_as_asked_for(home):
    """Else a curve over training can't be drawn afterwards, or a disk fills."""
    for keep, kept in ((2, [3, 4]), (9, [1, 2, 3, 4])):
        run("rloo.py", *RL[:-1], 4, "--save-every", 1, "--keep", keep, "--init", "one", "--out", f"keep-{keep}",
            cwd=home)
        assert [c.name for c in runs.checkpoints(home / f"keep-{keep}")] == [f"step-{step:06d}" for step in kept]


def test_completions_are_set_aside_when_they_grow(home):
    """Else a long run writes one file of gigabytes."""
    run("rloo.py", *RL[:-1], 3, "--save-every", 1, "--init", "one", "--out", "long", cwd=home, before=rotate_early)
    names = sorted(path.name for path in (home / "long").glob("completions*"))
    assert names == [f"completions-{step:06d}.jsonl" for step in (1, 2, 3)]
    assert [row["step"] for name in names for row in lines(home / "long" / name)] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_run_that_is_set_back_has_no_step_twice(home):
    """Else going back to an earlier checkpoint, by deleting those after it, leaves samples of the abandoned steps; or a
    complete run can't go back."""
    run("rloo.py", *RL[:-1], 3, "--save-every", 1, "--keep", 9, "--init", "one", "--out", "long", cwd=home,
        before=rotate_early)
    for step in (2, 3):
        shutil.rmtree(home / "long" / f"step-{step:06d}")
    run("rloo.py", "--resume", "long", cwd=home)
    rows = [row["step"] for path in sorted((home / "long").glob("completions*")) for row in lines(path)]
    assert rows == [0] * 4 + [1] * 4 + [2] * 4
    refused("rloo.py", "--resume", "long", home=home, naming="nothing to resume")


def test_a_resumed_run_names_the_commit_that_it_was_started_with(home):
    """Else who edits the method between the two can't tell what the first steps ran."""
    path = home / "one" / "config.json"
    edit(path, lambda found: found.update(commit="0123456789ab"))
    run("distill.py", "--resume", "one", "--steps", 3, cwd=home)
    found = json.loads(path.read_text())
    assert found["commit"] == "0123456789ab" and found["resumed_commit"] == runs.commit()


def test_another_rate_on_resume_is_that_of_the_heads_too(home):
    """Else the heads of a run that has diverged go on at the rate at which it did."""
    rates = config(home / "one")
    run("distill.py", "--resume", "one", "--steps", 3, "--lr", rates["lr"] / 100, cwd=home)
    row = lines(home / "one" / "metrics.jsonl")[2]
    assert row["head_lr"] / row["lr"] == pytest.approx(rates["head_lr"] / rates["lr"]) and rates["head_lr"] > 0
    run("distill.py", "--resume", "one", "--steps", 4, "--head-lr", 0.5, cwd=home)
    assert config(home / "one")["head_lr"] == 0.5 and config(home / "one")["lr"] == rates["lr"] / 100


def rotate_early():
    runs.ROTATE = 100


def test_a_run_says_what_it_came_from_and_refuses_other_problems(home):
    """Else nobody can run it again, or half of it is about other data."""
    row = '{{"question": "{} + {}?", "answer": {}}}\n'
    (home / "sums.jsonl").write_text("".join(row.format(a, 1, a + 1) for a in range(40)))
    run("rloo.py", *RL, "--init", "one", "--task", "sums.jsonl", "--out", "sums", cwd=home)
    whole = json.loads((home / "sums" / "config.json").read_text())
    assert {"python", "torch"} <= set(whole["versions"]) and len(whole["problems"]) == 16
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    assert commit.returncode or whole["commit"].removesuffix("-dirty").endswith(commit.stdout.strip())
    for other in (row.replace("{{", '{{"instruction": "Whisper.", '), row.replace("+", "plus")):
        (home / "sums.jsonl").write_text("".join(other.format(a, 1, a + 1) for a in range(40)))
        refused("rloo.py", "--resume", "sums", "--steps", 3, home=home, naming="are not those that it was")
    assert (home / "sums" / "complete.json").exists()


def test_stray_folders_are_no_checkpoints(home):
    """Else a copy kept beside them, or half of one, counts as the newest."""
    shutil.copytree(home / "one" / "step-000002", home / "one" / "step-000002.bak")
    (home / "one" / "step-000009.tmp").mkdir()
    (home / "one" / ".partial-000009").mkdir()
    assert runs.checkpoint(home / "one").name == "step-000002"
    run("distill.py", "--resume", "one", "--steps", 3, cwd=home)
    assert not (home / "one" / ".partial-000009").exists()  # it would lie there for ever


def test_the_rates_of_a_run_are_recorded(home):
    """Else it goes on at what another version takes for the default."""
    for name, rates in (("one", ("lr", "head_lr")), ("two", ("lr",))):
        logged = lines(home / name / "metrics.jsonl")[0]
        for rate in rates:
            assert config(home / name)[rate] * optim.schedule(0, config(home / name)["steps"]) == pytest.approx(
                logged[rate])
    assert config(home / "one")["exit_every"] == 2


# copied and moved

def test_the_embedded_model_is_known_wherever_it_lies(tmp_path):
    """Else a copy of it, or `--model data/tiny`, gets other defaults without a word, and a moved clone can't go on."""
    shutil.copytree(ROOT / "data" / "tiny", tmp_path / "elsewhere")
    run("distill.py", "--model", "elsewhere", "--responses", 2, "--held-out", 1, "--steps", 1, "--max-new-tokens", 4,
        "--out", "r", cwd=tmp_path)
    args = config(tmp_path / "r")
    assert [args[name] for name in ("model", "task", "rank", "micro_batch")] == ["embedded", "arithmetic", 8, 64]
    (tmp_path / "elsewhere" / "chat_template.jinja").write_text("{{ raise_exception('read') }}")  # another model, then
    refused("evaluate.py", "base", "--model", "elsewhere", "--task", "arithmetic", home=tmp_path, naming="read")
    (tmp_path / "elsewhere" / "chat_template.jinja").unlink()
    run("rloo.py", *RL[:-1], 1, "--init", "r", "--model", "elsewhere", cwd=tmp_path)


def test_a_moved_clone_goes_on(home):
    """Else a run ends with the folder it was started in."""
    run("distill.py", "--responses", 2, "--held-out", 1, "--steps", 1, "--max-new-tokens", 4, "--out", "first/runs/a",
        cwd=home)
    run("rloo.py", *RL[:-1], 1, "--init", "first/runs/a", "--out", "first/runs/b", cwd=home)
    shutil.rmtree(home / "first" / "runs" / "b" / "step-000001")  # so that it has to find stage 1 again
    (home / "first" / "runs" / "b" / "complete.json").unlink()
    (home / "first").rename(home / "second")
    for source in (*ROOT.glob("*.py"), *(ROOT / name for name in ("data", "fast", "report"))):
        if source.is_dir():
            shutil.copytree(source, home / "second" / source.name)
        else:
            shutil.copy(source, home / "second")
    done = fresh(home / "second" / "rloo.py", "--resume", "runs/b", cwd=home / "second")
    assert "stage 1: runs/a" in done.stdout and "evaluate.py runs/a runs/b" in done.stdout


def test_a_moved_model_is_named_by_a_flag_and_another_one_is_refused(home):
    """Else a run on a local model ends with that model's path, or goes on, wrong, with other weights."""
    (home / "toy").rename(home / "there")
    refused("rloo.py", *RL, "--init", "one", home=home, naming="or a hub id, by --model")
    run("rloo.py", *RL[:-1], 1, "--init", "one", "--model", "there", cwd=home)
    run("distill.py", "--resume", "one", "--model", "there", "--steps", 3, cwd=home)
    assert config(home / "one")["model"] == str(home / "there")
    toy_checkpoint(home / "other", seed=1)
    refused("distill.py", "--resume", "one", "--steps", 4, "--model", "other", home=home, naming="responses for model")
    for command in (("rloo.py", *RL, "--init", "one"), ("evaluate.py", "one")):
        refused(*command, "--model", "other", home=home, naming="another base model")


@pytest.mark.parametrize("before, now", [
    (("--task", "sums.jsonl"), ("--task", "there/sums.jsonl")),
    (("--task", "gsm8k", "--data", "sums.jsonl"), ("--data", "there/renamed.jsonl"))])
def test_a_moved_task_goes_on(home, before, now):
    """Else base responses that took hours are refused for where their questions lie."""
    mark = "#### " if "gsm8k" in before else ""
    (home / "sums.jsonl").write_text("".join(f'{{"question": "{a}?", "answer": "{mark}{a}"}}\n' for a in range(40)))
    run("distill.py", "--model", "toy", *SMALL, *before, "--out", "r", cwd=home)
    (home / "there").mkdir()
    (home / "sums.jsonl").rename(home / now[1])
    run("distill.py", "--resume", "r", *now, "--steps", 3, cwd=home)
    assert config(home / "r")[now[0][2:]] == str(home / now[1])


def test_stage_2_goes_on_under_the_chat_template_it_was_begun_with(home):
    """Else half of a run's rewards are of other prompts, and nothing says so."""
    path = home / "toy" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("{{ m.content }}", "{{ m.content }}!"))
    refused("rloo.py", "--resume", "two", "--steps", 3, home=home, naming="by the model's chat template")


def test_stage_2_that_took_no_step_starts_from_what_it_was_begun_with(home):
    """Else config.json names weights that it never had, by which the study tells whose stage 2 it is."""
    run("rloo.py", *RL, "--init", "one", "--out", "r", cwd=home)
    for path in ("step-000002", "complete.json", "metrics.jsonl", "completions.jsonl"):
        path = home / "r" / path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run("distill.py", "--resume", "one", "--steps", 3, cwd=home)
    refused("rloo.py", "--resume", "r", home=home, naming="the weights of the run that it starts from")


def test_stage_2_is_not_told_to_have_come_from_another_stage_1_of_that_name(home):
    """Else config.json names a folder that it never started from, and evaluate.py compares the two."""
    run("distill.py", "--model", "toy", *SMALL, "--seed", 1, "--out", "there/one", cwd=home)
    shutil.copytree(home / "two", home / "there" / "two")
    more = ("rloo.py", "--steps", 3, "--resume")
    refused(*more, "two", "--init", "there/one", home=home, naming="the weights of the run that it starts from")
    shutil.copytree(home / "one", home / "moved" / "one")
    run("distill.py", "--resume", "moved/one", "--steps", 3, cwd=home)  # the same that has trained on is the right one
    run(*more, "two", "--init", "moved/one", cwd=home)
    assert config(home / "two")["init"] == str(home / "moved" / "one")
    shutil.rmtree(home / "moved" / "one" / "step-000002")
    run("rloo.py", "--steps", 4, "--resume", "two", cwd=home)  # nor need it keep what nobody reads any more
    (home / "one").rename(home / "away")
    refused(*more, "there/two", home=home, naming="the weights of the run that it starts from")


def test_stage_2_is_compared_with_the_stage_1_that_it_started_from(home):
    """Else what a longer stage 1 gained since is told as what stage 2 lost."""
    (home / "runs").mkdir()
    run("rloo.py", *RL, "--init", "one", "--out", "runs/r", cwd=home)
    run("distill.py", "--resume", "one", "--steps", 4, cwd=home)
    evaluated = ("evaluate.py", "--n", 2, "--show", 0, "--out")
    assert "stage 1: " + str(home / "one" / "step-000002") in run(*evaluated, "a", cwd=home).stdout
    shutil.rmtree(home / "one" / "step-000002")
    assert "no longer what stage 2 started from" in run(*evaluated, "b", cwd=home).stderr
    shutil.rmtree(home / "one")
    run("distill.py", "--model", "toy", *SMALL, "--exit-every", 1, "--out", "one", cwd=home)
    done = run(*evaluated, "c", cwd=home)  # and not a fault at its end, in the figures by exit
    assert "one has other exits by now, and is left out" in done.stderr and "stage 1" not in done.stdout
    shutil.rmtree(home / "one")
    assert "is not there any more, and is left out" in run(*evaluated, "d", cwd=home).stderr


def test_stage_2_ends_well_where_its_stage_1_was_taken_away(home):
    """Else a complete run ends in an error, and whoever called it takes it for a failure."""
    shutil.rmtree(home / "one")
    assert "next: python evaluate.py two" in run("rloo.py", "--resume", "two", "--steps", 3, cwd=home).stdout


def test_a_thinking_mode_that_the_template_lacks_is_refused(home):
    """Else two runs that are alike can't share base responses, or be compared."""
    path = home / "toy" / "tokenizer_config.json"
    path.write_text(re.sub(r"{% if enable_thinking.*?endif %}", "", path.read_text()))
    refused("distill.py", "--model", "toy", *SMALL, "--no-thinking", "--out", "r", home=home,
            naming="has no thinking mode")


def test_a_run_whose_prompts_have_changed_stays_complete(home):
    """Else another chat template costs the held-out figures, and stage 2 no longer finds the run."""
    path = home / "one" / "teacher.jsonl"
    path.write_text(re.sub(r'"prompt_ids": \[\d+', '"prompt_ids": [7', path.read_text(), count=1))
    refused("distill.py", "--resume", "one", "--steps", 3, home=home, naming="responses to other prompts")
    assert (home / "one" / "complete.json").exists() and config(home / "one")["steps"] == 2


def test_stage_2_starts_from_stage_1_alone(home):
    """Else a second stage 2 passes for the first one's, with its base's KL paid twice."""
    refused("rloo.py", *RL, "--init", "two", home=home, naming="two is a run of rloo.py, not of distill.py; to go on "
            "with it: python rloo.py --resume two")


def test_an_earlier_checkpoint_can_be_looked_at_and_started_from(home):
    """Else a run that got worse is lost, though its better weights lie there."""
    run("distill.py", "--resume", "one", "--steps", 4, cwd=home)
    run("evaluate.py", "one", "one/step-000002", "--n", 2, "--show", 0, "--out", "e", cwd=home)
    names = [row["name"] for row in json.loads((home / "e" / "evaluation.json").read_text())["metrics"]]
    assert names == ["base", "stage 1 one", "stage 1 step-000002"]
    run("rloo.py", *RL[:-1], 1, "--init", "one/step-000002", "--out", "from", cwd=home)
    assert config(home / "from")["init"].endswith("one/step-000002")
    shutil.copytree(home / "one", home / "other")
    refused("rloo.py", "--resume", "from", "--init", "other/step-000002", home=home, naming="was started with --init")
    refused("distill.py", "--resume", "one/step-000002", home=home, naming="give one, which goes on from its newest")
    (home / "there").mkdir()
    for name in ("one", "from"):
        (home / name).rename(home / "there" / name)
    assert "stage 1: there/one/step-000002" in run("rloo.py", "--resume", "there/from", "--steps", 2, cwd=home).stdout


def test_stage_2_does_not_start_from_an_older_run_without_a_word(home):
    """Else after a dropped connection a night goes into the heads of a rehearsal."""
    (home / "runs").mkdir()
    (home / "one").rename(home / "runs" / "try")
    shutil.copytree(home / "runs" / "try", home / "runs" / "real")
    (home / "runs" / "real" / "complete.json").unlink()
    late = os.stat(home / "runs" / "try" / "complete.json").st_mtime + 9
    os.utime(home / "runs" / "real" / "config.json", (late, late))
    refused("rloo.py", *RL, home=home, naming="runs/real was begun after runs/try and is not complete")
    run("rloo.py", *RL[:-1], 1, "--init", "runs/try", cwd=home)
    config(home / "runs" / "real", model="another")
    os.utime(home / "runs" / "real" / "config.json", (late, late))
    run("rloo.py", *RL[:-1], 1, "--model", "toy", cwd=home)  # of the other model nothing is asked
    os.utime(home / "runs" / "real" / "config.json", (0, 0))
    run("rloo.py", *RL[:-1], 1, cwd=home)


# flags on resume

@pytest.mark.parametrize("flags, naming", [
    (("--lam", 7), "--lam=0.1, not with --lam=7.0"), (("--beta", 1), "--beta"), (("--out", "x"), "--out"),
    (("--max-new-tokens", 13), "--max-new-tokens=12, not"), (("--no-thinking",), "with --no-thinking"),
    (("--task", "stories"), "--task=arithmetic, not with"), (("--steps", 2), "is complete"), ((), "above 2 extends"),
    (("--steps", 1), "above 2 extends"), (("--seed", 1), "--seed=0, not"), (("--init", "other"), "--init"),
])
def test_resume_refuses_what_differs(home, flags, naming):
    """Else a flag is ignored without a word, or a run turns into another one half-way."""
    before = (home / "two" / "config.json").read_bytes()
    refused("rloo.py", "--resume", "two", *flags, home=home, naming=naming)
    assert (home / "two" / "complete.json").exists() and (home / "two" / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["steps", "init", "max_new_tokens", "prompts_per_step", "lr"])
def test_resume_refuses_a_lost_flag(home, name):
    """Else the run goes on under the defaults."""
    (home / "two" / "complete.json").unlink()
    config(home / "two", **{name: None})
    refused("rloo.py", "--resume", "two", home=home, naming=name)


def test_resume_takes_what_it_may_and_extends(home):
    """Else a run that should go on longer, or on another machine, has to start again."""
    run("rloo.py", "--resume", "two", "--steps", 3, "--micro-batch", 1, "--save-every", 1, "--lam", 0.1, "--init",
        "one", "--no-recompute", "--lr", 1e-4, cwd=home)
    assert lines(home / "two" / "metrics.jsonl")[2]["lr"] == pytest.approx(1e-4 * 0.3 / 3)  # as after bad gradients
    assert (home / "two" / "step-000003").exists() and len(lines(home / "two" / "metrics.jsonl")) == 3
    assert config(home / "two")["init"] == str(home / "one")  # from any folder, as the first start records it
    assert config(home / "two")["steps"] == 3 and json.loads((home / "two" / "complete.json").read_text())["step"] == 2


def test_a_run_and_an_evaluation_go_on_when_a_grade_of_ones_own_that_failed_is_mended(home):
    """Else one odd response costs a night's run."""
    own = """def problems(split, n, seed):
        for i in range(n):
            yield {"question": f"{split} {i}", "answer": i}
    calls = []
    def grade(problem, response):
        calls.append(1)
        assert len(calls) < LIMIT
        return len(response) > 2
    """.replace("\n    ", "\n")
    (home / "own.py").write_text(own.replace("LIMIT", "6"))
    refused("rloo.py", "--init", "one", *RL, "--task", "own.py", "--out", "mended", home=home,
            naming="a response that ends in ")
    ask = ("evaluate.py", "one", "--task", "own.py", "--n", 9, "--rows", 1, "--max-new-tokens", 12, "--out", "eval")
    refused(*ask, home=home, naming="a response that ends in ")
    before = lines(home / "eval" / "completions.jsonl")
    assert len(before) == 4 and any(len(row["text"]) <= 5 for row in before)
    (home / "eval" / "completions.jsonl").write_text(  # as if the grade had been another
        "".join(json.dumps(row | {"correct": True}) + "\n" for row in before))
    (home / "own.py").write_text(own.replace("LIMIT", "99").replace("> 2", "> 5"))
    done = run("rloo.py", "--resume", "mended", cwd=home)
    assert "its grade() and reward() count from here on" in done.stderr
    recorded = json.loads((home / "mended" / "config.json").read_text())
    assert recorded["resumed_judge"] not in ("", recorded["judge"])
    run(*ask, cwd=home)
    rows = lines(home / "eval" / "completions.jsonl")
    assert len(rows) == 18 and all(row["correct"] == (len(row["text"]) > 5 and row["finished"]) for row in rows)


def test_a_refused_extension_leaves_the_run_complete(home):
    """Else a typing error costs the held-out figures."""
    (home / "toy").rename(home / "gone")
    refused("distill.py", "--resume", "one", "--steps", 9, home=home, naming="--model")
    assert (home / "one" / "complete.json").exists() and config(home / "one")["steps"] == 2


def test_the_rate_warms_up_for_ten_steps_and_falls_to_zero():
    """A first step at the full rate undoes what a run starts from; a rate that stays high never settles."""
    assert [optim.schedule(step, 100) for step in (0, 4, 9, 50, 99)] == pytest.approx([0.1, 0.48, 0.91, 0.5, 0.01])


def test_a_response_is_graded_by_what_it_says_behind_its_thoughts_once_it_has_ended():
    """Else what was cut counts as right, thoughts that never ended pass for an answer, or the end is read with it."""
    tokenizer = Tokenizer.from_pretrained(ROOT / "data/tiny")
    problem = tasks.load("arithmetic", "test", n=1)[0]
    closed, opened = (tokenizer.encode(text) for text in ("<think>\n\n</think>\n\n", "<think>\n"))
    ids = tokenizer.encode(said := f"\\boxed{{{problem.gold}}}")
    for prompt, ended, right in ((closed, True, True), (closed, False, False), (opened, True, False)):
        response = Response(prompt, ids + tokenizer.encode("<|im_end|>") * ended, [], [], [], ended)
        grade = runs.grade(problem, response, tokenizer)
        assert (runs.text_of(response, tokenizer), grade.strict, grade.flexible) == (said, right, right)


def test_every_epoch_is_a_new_shuffle_of_all_problems():
    """Else some problems are never learned from, or all epochs and seeds take them in one order."""
    epochs = [[i for step in range(10) for i in optim.pick(10, 3, step, seed)] for seed in (0, 1)]
    orders = [tuple(picked[at : at + 10]) for picked in epochs for at in (0, 10, 20)]
    assert all(sorted(order) == list(range(10)) for order in orders) and len(set(orders)) == 6


def test_a_gradient_is_clipped_to_norm_1_as_a_whole_and_then_gone(tmp_path):
    """Unclipped, one odd batch of stage 1 throws a calibration back; left where it is, each step repeats all before."""
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.0)
    for gradients, wanted in (((3.0, 4.0), (-0.6, -8.0)), ((0.3, 0.4), (-0.9, -12.0))):
        for p, g in zip((a, b), gradients, strict=True):
            assert p.grad is None
            p.grad = torch.tensor([g])
        logged = runs.Run(tmp_path, None).apply_gradients(optimizer, 1.0, 10.0)
        assert (a.item(), b.item()) == pytest.approx(wanted)
        assert logged["grad_norm"] == pytest.approx(gradients[1] * 1.25)


def test_a_rate_of_zero_trains_nothing(home):
    """Else --lr 0 trains at the default rate."""
    for script, flags in (("distill.py", ("--model", "toy", *SMALL)), ("rloo.py", ("--init", "one", *RL))):
        run(script, *flags, "--lr", 0, "--out", f"zero-{script}", cwd=home)
    heads = load_file(home / "zero-distill.py" / "step-000002" / "exit_heads.safetensors")
    assert (heads["bias"] == -4).all() and (heads["weight"] == 0).all()
    before, after = (load_file(home / run / "step-000002" / "adapter_model.safetensors")
                     for run in ("one", "zero-rloo.py"))
    assert all(torch.equal(before[name], after[name]) for name in before)


# two at once, and refused

def test_two_runs_of_one_second_have_two_folders(home):
    """Else they write over each other."""
    processes = [forked(("distill.py", "--model", "toy", *SMALL), home, home / f"log{i}", before=stop_the_clock)
                 for i in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = sorted(path.name for path in (home / "runs").iterdir())
    assert found == ["distill-20260101-000000", "distill-20260101-000000-2"]
    assert all(len(lines(home / "runs" / name / "metrics.jsonl")) == 2 for name in found)


def stop_the_clock():
    real = time.strftime
    time.strftime = lambda form, *when: "20260101-000000" if form == "%Y%m%d-%H%M%S" else real(form, *when)


def test_a_run_in_use_is_not_taken(home):
    """Else two processes resume one run at once, and its logs hold both."""
    with running("rloo.py", *RL[:-1], 5000, "--init", "one", "--out", "busy", cwd=home) as process:
        wait_for(home / "busy" / "metrics.jsonl", process)
        refused("rloo.py", "--resume", "busy", "--steps", 1, home=home, naming=f"process {process.pid} on ")
        assert (home / "busy" / ".lock").read_text().count("process") == 1
        refused("rloo.py", *RL, "--init", "one", "--out", "busy", home=home, naming="--resume busy")
    run("rloo.py", "--resume", "busy", "--steps", 1 + len(lines(home / "busy" / "metrics.jsonl")), cwd=home)


def stall():
    import sample
    sample.generate_shared = lambda *args, **options: time.sleep(60)


def test_an_evaluation_in_use_is_not_taken(home):
    """Else two processes with one --out write every answer twice, and the folder is no good for either."""
    command = ("evaluate.py", "one", "--n", 3, "--max-new-tokens", 12, "--out", "busy")
    with running(*command, cwd=home, before=stall) as process:
        wait_for(home / "busy" / "begun.json", process)
        refused(*command, home=home, naming=f"busy is in use by process {process.pid} on ")
    run(*command, cwd=home)
    assert len(lines(home / "busy" / "completions.jsonl")) == 6


def test_a_refused_run_doesnt_block_its_own_folder(home):
    """Else the repaired command is refused for the folder that the refused one left."""
    command = ("distill.py", "--model", "toy", *SMALL, "--out", "r")
    refused(*command, "--max-new-tokens", 4090, home=home, naming="--max-new-tokens 4090")
    (home / "reward.py").write_text("def problems(split, n, seed):\n    return [{'question': split, 'answer': 1}]\n"
                                    "def reward(problem, response):\n    return 1 / 0\n")
    rl = ("rloo.py", "--init", "one", "--out", "r", *RL)
    assert "ZeroDivisionError" in refused(*rl, "--task", "reward.py", home=home, naming="reward.py:4)")
    run(*rl, cwd=home)


def test_bad_data_is_found_before_the_model_is_loaded(home):
    """Else minutes pass before a typing error is told."""
    (home / "bad.jsonl").write_text('{"question": \n')
    (home / "toy" / "model.safetensors").write_bytes(b"")
    refused("distill.py", "--model", "toy", "--data", "bad.jsonl", home=home, naming="bad.jsonl:1")


def test_the_next_command_is_one_that_works(home):
    """Else it names a run that the command won't take: the newest one, or one that --out put elsewhere."""
    flags = {"rloo.py": (*RL, "--task", "stories"), "evaluate.py": ("--n", 2, "--out", "eval")}
    done = run("distill.py", "--model", "toy", *SMALL, "--out", "a sweep/r", cwd=home)
    assert "the base solves 0.0% of 6 training problems: stage 2 learns from" in done.stdout
    for script in ("rloo.py", "evaluate.py"):
        (command,) = [line.removeprefix("next: python ") for line in done.stdout.splitlines() if "next: " in line]
        done = run(*shlex.split(command), *flags[script], cwd=home)
    assert "a sweep/r" in done.stdout and ": stories" in done.stdout


# the base's responses of another run

def test_responses_of_another_run_are_taken_as_far_as_asked_for(home):
    """Else --responses and --held-out are ignored with --teacher."""
    run("distill.py", "--model", "toy", *SMALL, "--responses", 4, "--responses-per-step", 4, "--held-out", 2,
        "--teacher", "one/teacher.jsonl", "--out", "r", cwd=home)
    rows = [row for row in lines(home / "one" / "teacher.jsonl") if "split" in row]
    tokens = {split: [len(row["token_ids"]) for row in rows if row["split"] == split] for split in ("train", "test")}
    assert lines(home / "r" / "metrics.jsonl")[0]["tokens"] == sum(tokens["train"][:4])
    assert json.loads((home / "r" / "complete.json").read_text())["positions"] == sum(tokens["test"][:2])


def test_a_run_keeps_the_responses_that_it_took(home):
    """Else it can't go on once the other run is gone; nor, if that was away when it began, once it is back."""
    run("distill.py", "--model", "toy", *SMALL, "--teacher", "one", "--out", "r", cwd=home)
    for path in (home / "r").iterdir():
        if path.name not in ("config.json", ".lock"):  # what there is after a kill at the start
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (home / "one").rename(home / "away")
    refused("distill.py", "--resume", "r", home=home, naming="no such file")
    assert not (home / "r" / "teacher.jsonl").exists()
    (home / "away").rename(home / "one")
    run("distill.py", "--resume", "r", "--steps", 3, "--teacher", "one", cwd=home)
    shutil.rmtree(home / "one")
    run("distill.py", "--resume", "r", "--steps", 4, cwd=home)


@pytest.mark.parametrize("flags, naming", [
    (("--task", "stories"), "task 'arithmetic'"), (("--no-thinking",), "thinking True"),
    (("--max-new-tokens", 9), "max_new_tokens 12"), (("--model", "other"), "model "),
    (("--responses", 7), "holds 6 responses of split train, of 7"),
    (("--held-out", 4), "holds 3 responses of split test, of 4"), (("--teacher", "none"), "--teacher none: no such"),
])
def test_responses_about_something_else_are_refused(home, flags, naming):
    """Else stage 1 trains on nonsense, or ends in an IndexError."""
    if "other" in flags:
        toy_checkpoint(home / "other", seed=1)
    refused("distill.py", "--model", "toy", *SMALL, "--teacher", "one/teacher.jsonl", *flags, home=home, naming=naming)


def test_responses_to_another_file_of_the_same_name_are_refused(home):
    """Else stage 1 trains on problems that its config.json doesn't name."""
    for folder, words in (("a", "pens"), ("b", "cats")):
        (home / folder).mkdir()
        problems = [json.dumps({"question": f"How many {words} are {i}?", "answer": i}) for i in range(40)]
        (home / folder / "q.jsonl").write_text("\n".join(problems))
    flags = ("--model", "toy", *SMALL[2:], "--task")
    run("distill.py", *flags, "a/q.jsonl", "--out", "r", cwd=home)
    refused("distill.py", *flags, "b/q.jsonl", "--teacher", "r", home=home, naming="to none of these prompts")
    again = run("distill.py", *flags, "a/q.jsonl", "--teacher", "r", "--out", "again", cwd=home)
    assert "would not ask" not in again.stderr
    rows = [json.loads(row) | {"thinking": i % 2 > 0} for i, row in enumerate(problems)]
    (home / "b" / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))  # of the cats, half in another form
    run("distill.py", *flags, "b/q.jsonl", "--out", "mixed", cwd=home)
    (home / "b" / "q.jsonl").write_text("\n".join(problems))
    told = run("distill.py", *flags, "b/q.jsonl", "--teacher", "mixed", "--out", "more", cwd=home).stderr
    others = re.search(r"(\d) of --teacher's 6 responses are to prompts that this run would not ask", told)
    assert others and 0 < int(others[1]) < 6


# compared

def evaluated(home, *flags):
    shutil.rmtree(home / "eval", ignore_errors=True)
    done = run("evaluate.py", *flags, "--n", 2, "--max-new-tokens", 12, "--out", "eval", cwd=home)
    return done, json.loads((home / "eval" / "evaluation.json").read_text())


def test_runs_of_the_same_name_have_a_column_each(home):
    """Else one of two runs named alike disappears from the comparison."""
    for folder in ("a", "b"):
        shutil.copytree(home / "one", home / folder / "r")
    _, found = evaluated(home, "a/r", "b/r")
    assert [m["name"] for m in found["metrics"]] == ["base", "stage 1 a/r", "stage 1 b/r"]
    refused("evaluate.py", "a/r", "b/../a/r", home=home, naming="names a run twice")
    (home / "b" / "r").rename(home / "b" / "s")
    run("evaluate.py", ".", "../../b/s", "--n", 2, "--show", 0, "--max-new-tokens", 12, "--out", "../../here",
        cwd=home / "a" / "r")
    named = [m["name"] for m in json.loads((home / "here" / "evaluation.json").read_text())["metrics"]]
    assert named == ["base", "stage 1 r", "stage 1 s"]


def test_runs_about_different_things_are_not_compared_unasked(home):
    """Else one of them is measured on a task that it never saw, and nobody is told. Data of a task that isn't asked
    for don't matter; and where no run is named, the last one's task does not stand in the way of its own stage 1."""
    config(home / "two", task="gsm8k", data="x.jsonl")
    refused("evaluate.py", "one", "two", home=home, naming="and two has 'x.jsonl': compare runs about the same, or "
            "give --task and --data for")
    evaluated(home, "one", "two", "--task", "arithmetic")
    (home / "runs").mkdir()
    (home / "two").rename(home / "runs" / "two")
    config(home / "runs" / "two", task="stories", data=None)
    assert evaluated(home)[1]["args"]["task"] == "stories"


def test_an_unfinished_run_is_marked(home):
    """Else a run that is half-way is taken for the result."""
    (home / "two" / "complete.json").unlink()
    done, found = evaluated(home, "one", "two")
    assert [m["name"] for m in found["metrics"]] == ["base", "stage 1", "stage 2 (unfinished, step-000002)"]
    (home / "one" / "complete.json").unlink()
    assert "one (unfinished, step-000002)" in run("rloo.py", *RL, "--init", "one", cwd=home).stdout


def test_an_evaluation_never_overwrites_a_run_or_another(home):
    """Else their completions are lost."""
    before = (home / "two" / "completions.jsonl").read_bytes()
    refused("evaluate.py", "two", "--n", 2, "--out", "two", home=home, naming="--out two holds config.json")
    evaluated(home, "base", "--model", "toy", "--task", "arithmetic")
    refused("evaluate.py", "two", "--n", 2, "--out", "eval", home=home, naming="--out eval holds evaluation.json")
    refused("evaluate.py", "two", "--n", 2, "--max-new-tokens", 99_999, home=home, naming="leave room for")
    assert not list((home / "runs").glob("evaluate*"))
    assert (home / "two" / "completions.jsonl").read_bytes() == before


def die_asking(base: bool, time: int = 1):
    """Kills the process where evaluate.py is about to ask the base, or a run, for the first time or a later one."""
    import sample
    generate, asked = sample.generate_shared, []

    def dies(*args, depths, **options):
        asked.extend([1] * ((depths is not None) == base))
        return os.kill(os.getpid(), signal.SIGKILL) if len(asked) == time else generate(*args, depths=depths, **options)

    sample.generate_shared = dies


def die_writing():
    """Kills the process between evaluate.py's first two writes of what it finds in its folder."""
    import evaluate
    written = []

    def dying(write, *args):
        if written:
            os._exit(9)
        written.append(args)
        write(*args)

    evaluate.write_text, evaluate.write_json = partial(dying, evaluate.write_text), partial(dying, evaluate.write_json)


def test_an_evaluation_goes_on_in_the_middle_of_a_model_and_drops_what_an_older_checkpoint_said(home):
    """Else a kill costs all of a large model's answers, or two checkpoints' answers stand in one column."""
    command = ("evaluate.py", "one", "two", "--n", 9, "--rows", 1, "--max-new-tokens", 12, "--out")
    run(*command, "whole", cwd=home)
    parts = partial(die_asking, False, 2)
    assert run(*command, "part", cwd=home, ok=None, before=parts).returncode == -signal.SIGKILL
    path = home / "part" / "completions.jsonl"
    assert len(lines(path)) == 9 + 4  # the base's, and a part of four
    with open(path, "a") as file:
        file.write('{"model": "stage 1", "id":')  # as a kill leaves it
    shutil.copytree(home / "part", home / "again")
    run(*command, "part", cwd=home, before=partial(die_asking, True))
    assert path.read_bytes() == (home / "whole" / "completions.jsonl").read_bytes()
    run("distill.py", "--resume", "one", "--steps", 3, cwd=home)
    assert run(*command, "again", cwd=home, ok=None, before=die_writing).returncode == 9
    run(*command, "again", cwd=home, before=partial(die_asking, True))
    answers = [[row for row in lines(home / name / "completions.jsonl") if row["model"] == "stage 1"]
               for name in ("whole", "again")]
    assert len(answers[1]) == 9 and answers[0] != answers[1]
    run(*command, "fresh", cwd=home)
    assert answers[1] == [row for row in lines(home / "fresh" / "completions.jsonl") if row["model"] == "stage 1"]


def test_a_stopped_evaluation_goes_on(home):
    """Else a kill in the last of three models costs an hour of sampling, or what goes on is another evaluation."""
    command = ("evaluate.py", "one", "two", "--n", 3, "--max-new-tokens", 12, "--out")
    run(*command, "whole", cwd=home)
    assert run(*command, "part", cwd=home, ok=None, before=partial(die_asking, False)).returncode == -signal.SIGKILL
    refused(*command, "part", "--seed", 1, home=home, naming="--out part holds an evaluation")
    shutil.copytree(home / "part", home / "unknown")
    (home / "unknown" / "begun.json").unlink()
    refused(*command, "unknown", home=home, naming="--out unknown holds an evaluation")
    run(*command, "part", cwd=home, before=partial(die_asking, True))
    for name in ("completions.jsonl", "page.html"):
        assert (home / "part" / name).read_bytes() == (home / "whole" / name).read_bytes()


def test_an_evaluation_of_another_model_is_not_overwritten(home):
    """Else an hour of one model's answers is gone without a word, for --model may say that a model has moved."""
    toy_checkpoint(home / "other", seed=1)
    command = ("evaluate.py", "base", "--task", "arithmetic", "--n", 9, "--rows", 1, "--max-new-tokens", 12, "--out",
               "part", "--model")
    run(*command, "toy", cwd=home, ok=None, before=partial(die_asking, True, 2))
    before = (home / "part" / "completions.jsonl").read_bytes()
    refused(*command, "other", home=home, naming="--out part holds an evaluation of another model")
    assert before and (home / "part" / "completions.jsonl").read_bytes() == before
    (home / "toy").rename(home / "moved")
    run(*command, "moved", cwd=home)


def test_an_evaluation_killed_before_its_first_answer_goes_on(home):
    """Else its own folder is refused, as another evaluation's."""
    command = ("evaluate.py", "one", "--n", 3, "--max-new-tokens", 12, "--out", "part")
    assert run(*command, cwd=home, ok=None, before=die_writing).returncode == 9
    assert not (home / "part" / "begun.json").exists()
    run(*command, cwd=home)


def test_a_damaged_answer_of_a_stopped_evaluation_is_named(home):
    """Else it ends in a traceback."""
    command = ("evaluate.py", "one", "--n", 9, "--rows", 1, "--max-new-tokens", 12, "--out", "part")
    run(*command, cwd=home, ok=None, before=partial(die_asking, True, 2))
    path = home / "part" / "completions.jsonl"
    first, second, *_ = lines(path)
    for damaged, naming in (({}, "'model'"), ({"model": "base"}, "'prompt_ids'"), (second | {"depths": [9]}, "depths"),
                            (second | {"logp_exit": None}, "logp_exit"), (second | {"finished": 1}, "finished")):
        path.write_text(json.dumps(first) + "\n" + json.dumps(damaged) + "\n")
        assert naming in refused(*command, home=home, naming="part/completions.jsonl:2: ")


def test_the_base_alone_is_evaluated(home):
    """Else there is no baseline before the first run."""
    done, found = evaluated(home, "base", "--model", "toy", "--task", "arithmetic")
    assert [m["name"] for m in found["metrics"]] == ["base"] and found["metrics"][0]["exit_rate"] == 0
    _, both = evaluated(home, "base", "one")
    assert [m["name"] for m in both["metrics"]] == ["base", "stage 1"]


def test_a_damaged_run_is_not_the_newest(home):
    """Else one broken folder under runs/ stops every command that looks for the newest."""
    shutil.copytree(home / "one", home / "runs" / "one")
    for name, text in (("torn", '{"stage": "dis'), ("old", '{"stage": "distill", "args": {}}')):
        (home / "runs" / name).mkdir()
        (home / "runs" / name / "config.json").write_text(text)
        (home / "runs" / name / "complete.json").write_text("{}")
    assert "stage 1: " + str(home / "runs" / "one") in run("rloo.py", *RL, "--model", "toy", cwd=home).stdout
