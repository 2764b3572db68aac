import pytest
import torch
import torch.nn.functional as F
from golden import CASES, Case, load

rrd = load("rrd")
NAMES = {f"project_{side}.{end}": f"embed_{side}.{end}" for side in "st" for end in ("weight", "bias")}


def build(case):
    h = case.hyper
    loss = rrd.RRD(16, 12, h["nce_k"], h["T_s"], h["T_t"], h["enqueue_first"], dim=h["feat_dim"])
    case.fill(loss, NAMES)
    loss.queue.copy_(case["queue"])
    loss.oldest.fill_(h["ptr"])
    return loss


def check_queue(loss, case, after=""):
    assert torch.allclose(loss.queue, case.array(case.outputs[f"queue_after{after}"]), rtol=1e-12)
    assert loss.oldest.item() == case.outputs[f"ptr_after{after}"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rrd_20")])
def test_golden(name):
    case = Case(name)
    loss = build(case)
    value, entropy = loss(case["f_s"], case["f_t"])
    if name.endswith("two_steps"):
        assert value.item() == pytest.approx(case.outputs["loss_step1"], rel=1e-9)
        check_queue(loss, case, after=1)
        value, entropy = loss(case["f_s_2"], case["f_t_2"])
        check_queue(loss, case, after=2)
    else:
        check_queue(loss, case)
    p = case.array(case.outputs["teacher_distribution"])
    assert entropy.item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-9)
    if name.endswith("total_kd"):
        kd = rrd.kd_loss(case["logits_s"], case["logits_t"], rrd.Args().kd_temperature)
        value = F.cross_entropy(case["logits_s"], case["target"]) + kd + rrd.Args().rrd_weight * value
    case.check(value)


def test_golden_start_of_the_queue(monkeypatch):
    case = Case("rrd_queue_start")
    monkeypatch.setattr(torch, "randn", lambda *size: case["raw"])
    assert torch.allclose(rrd.RRD(4, 4, 24, 0.04, 0.1, False, dim=8).queue, case.array(case.outputs["queue"]), rtol=1e-12)


@pytest.mark.parametrize("sizes", [[16, 24, 24, 24, 16], [24, 60]])
def test_the_queue_holds_the_last_vectors_in_order_of_arrival(sizes):
    loss, arrived = rrd.RRD(4, 4, 50, 0.04, 0.1, False, dim=2), torch.randn(sum(sizes), 2)
    for batch in arrived.split(sizes):
        loss.enqueue(batch)
    order = (loss.oldest + torch.arange(50)) % 50
    assert torch.equal(loss.queue[order], arrived[-50:])


def test_place_after_an_epoch_of_cifar():
    loss = rrd.RRD(4, 4, 16384, 0.04, 0.1, False, dim=2)
    for n in [64] * 781 + [16]:
        loss.enqueue(torch.zeros(n, 2))
    assert loss.oldest.item() == 848


@pytest.mark.parametrize("enqueue_first", [False, True])
def test_equal_vectors_and_temperatures_reach_the_entropy(enqueue_first):
    torch.manual_seed(0)
    loss, f = rrd.RRD(4, 4, 32, 0.1, 0.1, enqueue_first, dim=3).double(), torch.randn(6, 4).double().requires_grad_()
    loss.project_s.load_state_dict(loss.project_t.state_dict())
    value, entropy = loss(f, f.detach())
    value.backward()
    assert value.item() == pytest.approx(entropy.item(), rel=1e-12) and f.grad.abs().max() < 1e-12


def test_only_the_students_projection_is_trained():
    loss = rrd.RRD(64, 256, 32, 0.04, 0.1, False)
    counts = {trained: sum(p.numel() for p in loss.parameters() if p.requires_grad == trained) for trained in (True, False)}
    assert counts == {True: 128 * 64 + 128, False: 128 * 256 + 128}
    assert set(dict(loss.named_buffers())) == {"queue", "oldest"} <= set(loss.state_dict())
