"""Runs cuda_path.py, the CUDA path on a simulated device, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.backends.cuda.is_built() or sys.platform != "linux",
                    reason="the device is simulated in torch's CPU build on Linux")
def test_the_cuda_path_on_a_simulated_device():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda_path.py"],
                          cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
