"""Learning rates: those of the published recipe, and the defaults for other students and shorter runs."""

import json

import pytest
import torch
from harness import GOLDEN, common, load
from torch.optim.lr_scheduler import MultiStepLR

SCHEDULES = {golden["name"]: golden for golden in json.loads((GOLDEN / "schedule.json").read_text())["schedules"]}


def resolved(**flags):
    args = load("vanilla").Args(**flags)
    common.resolve(args)
    return args


def rates(args):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], args.lr)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)
    seen = []
    for _ in range(args.epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(("schedule", "student"), [("default", "resnet20"), ("small_networks", "mobilenetv2")])
def test_golden(schedule, student):
    golden = SCHEDULES[schedule]
    args = resolved(student=student)
    assert list(args.milestones) == golden["milestones"]
    assert args.epochs == len(golden["lr"]) == 240
    assert rates(args) == pytest.approx(golden["lr"], rel=1e-12, abs=0)


def test_first_lower_epochs():
    lr = rates(resolved())
    for epoch, expected in {1: 0.05, 150: 0.05, 151: 5e-3, 180: 5e-3, 181: 5e-4, 210: 5e-4, 211: 5e-5, 240: 5e-5}.items():
        assert lr[epoch - 1] == pytest.approx(expected), epoch


@pytest.mark.parametrize("student", common.NETWORKS)
def test_default_rate_of_every_student(student):
    assert resolved(student=student).lr == (0.01 if student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)


def test_given_values_stay():
    args = resolved(student="mobilenetv2", lr=0.3, milestones=(1, 2))
    assert (args.lr, tuple(args.milestones)) == (0.3, (1, 2))
    assert tuple(resolved(milestones=()).milestones) == ()


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 8, 20, 30, 100, 240, 480])
def test_milestones_of_a_short_run(epochs):
    milestones = resolved(epochs=epochs).milestones
    assert list(milestones) == sorted({epochs * eighths // 8 for eighths in (5, 6, 7)} - {0})
    lr = rates(resolved(epochs=epochs))
    assert lr[0] == 0.05
    assert lr[-1] == pytest.approx(0.05 * 0.1 ** len(milestones))  # every milestone takes effect within the run
