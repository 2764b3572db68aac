"""Every method, killed right after any of its checkpoints and started again, ends as if nothing had happened."""

from pathlib import Path

import numpy as np
import pytest
import torch
from harness import METHODS, common, load
from inprocess import Killed, Script, rows, weights


@pytest.mark.parametrize("method", METHODS)
def test_killed_after_any_checkpoint(method, monkeypatch, capfd, tmp_path):
    script = Script(monkeypatch, capfd, tmp_path)
    monkeypatch.setattr(common, "SAVE_EVERY", 0)
    torch.manual_seed(0)
    torch.save(common.build("resnet8", 100).state_dict(), "teacher.pt")
    flags = ["--epochs 2"]
    names = {field for field in load(method).Args.__dataclass_fields__}
    flags += ["--teacher resnet8 --teacher-weights teacher.pt"] * ("teacher" in names) + ["--peer resnet8"] * ("peer" in names)
    flags += ["--init-epochs 2"] * ("init_epochs" in names)
    assert script(method, *flags, "--runs whole").code == 0
    (whole,) = Path("whole").iterdir()

    write, written = common.write_checkpoint, []

    def write_and_die(path, state):
        write(path, state)
        written.append(path.name)
        raise Killed

    monkeypatch.setattr(common, "write_checkpoint", write_and_die)
    lives = 4 if "init_epochs" in names else 2
    for life in range(lives):
        assert script(method, *flags, "--runs broken").code == -9
        assert len(written) == life + 1
    assert script(method, *flags, "--runs broken").code == 0  # nothing is left to train
    (broken,) = Path("broken").iterdir()
    assert rows(broken) == rows(whole)
    assert np.array_equal(weights(broken / "student.pt"), weights(whole / "student.pt"))
