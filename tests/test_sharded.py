"""A base that is shared out over ranks (gloo) against a whole one."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import distill
import parallel
from checkpoints import adapter_tensors, fill, fingerprint, save_policy
from fast import sharded
from sample import generate
from tests.commands import RL, SMALL, lines, run, toy_checkpoint
from tests.test_parallel import PROMPTS, add_gradient, samples_of, stage_2, together
from tests.toys import assert_close, toy_policy


def shared_out(p) -> bool:
    return hasattr(p, "to_local")


def share_out(policy, fits: bool) -> list[int]:
    """Shares a policy out; how many blocks were whole at each turn."""
    class Shards(sharded.Shards):
        def turn(self, wanted):
            whole.append(sum(not shared_out(block.mlp.up_proj.weight) for block in self.blocks))
            return super().turn(wanted)

        def fits(self):
            return fits or parallel.rank() > 0  # one without room is enough

    whole, base = [], [p for p in policy.model.model.layers.parameters() if not p.requires_grad]
    numbers, policy.model.fingerprint = sum(p.numel() for p in base), fingerprint(policy.model)
    Shards(policy, "cpu")
    base = [p for p in policy.model.model.layers.parameters() if not p.requires_grad]
    kept = sum(p.to_local().numel() for p in base)
    assert abs(kept / numbers - 1 / parallel.size()) < 0.3 / parallel.size()  # dimension 0 does not always divide
    return whole


@parallel.shared
def main() -> None:
    """What the ranks of the next test do: a rollout, a gradient of each stage, a checkpoint."""
    policy, results, (out, *how) = toy_policy(seed=2).double(), {}, sys.argv[1:]
    policy.model.recompute = "recompute" in how
    whole = share_out(policy, "fits" in how) if parallel.size() > 1 else [0]
    share = parallel.share(len(PROMPTS))
    with policy.model.gathered():
        mine = generate(policy, PROMPTS[share], samples=2, max_new_tokens=6, eos_ids=range(0, 61, 7), seed=(4,),
                        first_response=2 * share.start)
    drawn = parallel.all_gather(mine)
    results["samples"] = samples_of(drawn)

    def gradient(name):
        add_gradient(policy, results, name)
        for p in policy.trained().values():
            p.data.sub_(p.grad, alpha=1e-3)
        policy.zero_grad()

    distill.train_step(policy, drawn[:5], 1, 1.0, 3, 1)  # 5 micro-batches: other numbers of them on the ranks
    gradient("stage 1")
    stage_2(policy, mine, share, micro_batch=1)
    gradient("stage 2")
    if parallel.rank() == 0:  # alone, as for evaluate.py's page: the others help
        with torch.no_grad():
            results["h"] = policy(torch.tensor(PROMPTS[:1])).h
    parallel.all_gather([])
    assert max(whole) <= 2, whole  # the one that runs, and in a backward pass the one that ran before
    assert parallel.size() == 1 or all(shared_out(block.mlp.up_proj.weight) for block in policy.model.model.layers)

    folder = Path(f"{out}-{parallel.rank()}")
    folder.mkdir()
    save_policy(policy, folder)
    before = {name: p.detach().clone() for name, p in adapter_tensors(policy).items()}
    for p in adapter_tensors(policy).values():
        p.data.zero_()
    fill(adapter_tensors(policy), folder / "adapter_model.safetensors")
    assert all(torch.equal(p, before[name]) for name, p in adapter_tensors(policy).items())
    if parallel.rank() == 0:
        save_file(results, out)


def test_a_base_that_is_shared_out_draws_and_learns_what_a_whole_one_does(tmp_path):
    """Else a large model trains on something else; or the ranks, whose tokens exit at different depths, whose responses
    end at different times and of which one has none, wait for each other for ever; or nothing is shared out; or a
    checkpoint holds a part of the adapters."""
    together(1, "tests.test_sharded", "alone", cwd=tmp_path)
    alone = load_file(tmp_path / "alone")
    for size, how in ((2, ("fits",)), (4, ("recompute",))):
        together(size, "tests.test_sharded", f"{size}", *how, cwd=tmp_path)
        other = load_file(tmp_path / f"{size}")
        assert other.keys() == alone.keys()
        for name, value in alone.items():
            assert_close(other[name], value, 1e-10)
        for rank in range(size):
            ours, theirs = tmp_path / "alone-0", tmp_path / f"{size}-{rank}"
            assert (theirs / "exit_config.json").read_text() == (ours / "exit_config.json").read_text()
            saved = load_file(theirs / "adapter_model.safetensors")
            for name, value in load_file(ours / "adapter_model.safetensors").items():
                assert_close(saved[name], value, 1e-10)


def test_the_commands_with_shard_are_those_without(tmp_path):
    """Else some pass of a script is made by one process while the others wait elsewhere."""
    toy_checkpoint(tmp_path / "toy")
    both = []
    for start, flags, folder in ((run, (), "1"), (lambda *c, cwd: together(2, *c, cwd=cwd), ("--shard",), "2")):
        start("distill.py", "--model", "toy", *SMALL, "--out", f"one-{folder}", *flags, cwd=tmp_path)
        start("rloo.py", *RL, "--init", "one-1", "--out", f"two-{folder}", *flags, cwd=tmp_path)
        start("evaluate.py", "one-1", "two-1", "--n", 3, "--out", f"eval-{folder}", *flags, cwd=tmp_path)
        page = json.loads((tmp_path / f"eval-{folder}" / "evaluation.json").read_text())["metrics"]
        one, two = (lines(tmp_path / f"{stage}-{folder}" / "metrics.jsonl")[0] for stage in ("one", "two"))
        both.append((one["loss"], two["reward"], two["kl"], two["grad_norm"], *(m["average_compute"] for m in page)))
    assert_close(both[1], both[0], 1e-4)
    done = run("distill.py", "--model", "toy", *SMALL, "--shard", cwd=tmp_path, ok=False)
    assert "--shard needs several processes" in done.stderr
