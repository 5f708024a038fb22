"""Teaching a checkpoint a generator, on a toy."""

import argparse

import pytest
from safetensors import SafetensorError

import checkpoints
from data import finetune, make_tiny
from data.hub import UserError
from model import Transformer
from tests.commands import lines, toy_checkpoint
from tests.toys import edit


@pytest.fixture
def teach(tmp_path, monkeypatch):
    toy = toy_checkpoint(tmp_path / "toy", layers=2)

    def call(out, *more):
        monkeypatch.setattr("sys.argv", ["finetune", "--model", str(toy), "--out", str(tmp_path / out), "--steps", "32",
                                         "--batch-size", "2", "--lr", "0.01", "--n", "1", *more])
        finetune.main()
        return tmp_path / out

    return call


def test_a_stopped_training_ends_where_an_unbroken_one_does(teach, monkeypatch):
    """And learns. Moments or the step's number lost on the way would give other weights."""
    whole = teach("whole")
    losses = [row["loss"] for row in lines(whole / "metrics.jsonl")]
    assert len(losses) == 32 and sum(losses[-4:]) < 0.8 * sum(losses[:4])

    save = finetune.save_state

    def then_die(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr(finetune, "save_state", then_die)
        teach("broken")
    broken = teach("broken")
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    Transformer.from_pretrained(broken)  # a checkpoint like any other, whatever else lies beside it


def test_a_full_disk_is_one_line(teach, monkeypatch):
    """Else a traceback."""
    def full(*_, **__):
        raise SafetensorError("File too large")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match="out/model.part can't be written"):
        teach("out")


def test_what_it_can_not_teach_is_refused(teach, tmp_path):
    """Other flags on resuming, and a model whose responses end in another token."""
    teach("begun")
    with pytest.raises(UserError, match="begun with --lr 0.01, not 0.02"):
        teach("begun", "--lr", "0.02")
    state = tmp_path / "begun" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="state.safetensors is damaged"):
        teach("begun")
    state.write_bytes(whole)
    (tmp_path / "begun").rename(tmp_path / "moved")
    assert teach("moved") == tmp_path / "moved"  # where it lies is no flag
    for name in ("generation_config.json", "config.json"):
        edit(tmp_path / "toy" / name, lambda config: config.update(eos_token_id=7))
    with pytest.raises(UserError, match="use a ChatML checkpoint"):
        teach("other")


def test_the_embedded_training_goes_on_under_the_flags_it_was_begun_with(tmp_path):
    """Else it ends at once, done, with the weights of other flags; only the number of steps may change."""
    args = argparse.Namespace(out=tmp_path / "out", steps=5, compile=False, story_share=0.5)
    free = ("out", "steps", "compile")
    make_tiny.begin(args, free)
    args.steps = 6
    make_tiny.begin(args, free)
    args.story_share = 0.6
    with pytest.raises(UserError, match="begun with --story-share 0.5, not 0.6"):
        make_tiny.begin(args, free)
