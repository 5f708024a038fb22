"""What several files of tests start from."""

import os
import re
import shutil

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a toy's products are too small to share among threads
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tolerances are those of float32 on a CPU

from tests.commands import RL, SMALL, run, toy_checkpoint


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a toy checkpoint and a complete run of each stage, made by the two commands. Not to be changed."""
    home = tmp_path_factory.mktemp("trained")
    toy_checkpoint(home / "toy")
    run("distill.py", "--model", "toy", *SMALL, cwd=home)
    run("rloo.py", "--lam", "0.1", *RL, cwd=home)
    return home


@pytest.fixture
def home(trained, tmp_path):
    """A copy to change: the checkpoint as toy/, the runs as one/ and two/, which say that they were trained on it."""
    for name, found in (("toy", "toy"), ("one", "runs/distill-*"), ("two", "runs/rloo-*")):
        (source,) = trained.glob(found)
        config = shutil.copytree(source, tmp_path / name) / "config.json"
        text = config.read_text().replace(str(trained / "toy"), str(tmp_path / "toy"))
        config.write_text(re.sub(r'"init": "[^"]*"', f'"init": "{tmp_path / "one"}"', text))
    return tmp_path
