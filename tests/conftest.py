import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores; set before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"

import json

import pytest
from harness import run_script


@pytest.fixture(scope="session")
def synthetic_teacher(tmp_path_factory):
    """Weights of a resnet8 trained on the synthetic set by methods/vanilla.py."""
    folder = tmp_path_factory.mktemp("teacher")
    flags = "--student resnet8 --dataset synthetic --device cpu --epochs 6 --runs".split()
    done = run_script("vanilla", *flags, str(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    (run,) = folder.iterdir()
    assert json.loads((run / "result.json").read_text())["last"] > 50
    return run / "student.pt"
