"""AT: Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention Transfer.
Zagoruyko and Komodakis, 2017, arXiv 1612.03928.

The energy of a feature map at each position, averaged over the channels, shows where the network attends. The student must
attend where the teacher does, at every stage. The numbers of channels may differ.

    Q(f) = a / |a|,   a = mean of f^2 over the channels, a vector of H W positions
    L_at = sum over stages 1 ... k of mean (Q(f_s) - Q(f_t))^2       over batch and positions
    KD   = T^2 mean_i KL(p_t || p_s),   p = softmax(z / T),   T = kd_temperature
    L    = ce_weight CE + kd_weight KD + at_weight L_at

Taken from HobbitLong/RepDistiller@b84f547 (distiller_zoo/AT.py), the source of the published tables; the authors' code,
szagoruyko/attention-transfer@893df54, has the same loss. Published: resnet56/resnet20 70.55 (last epoch). mobilenetv2 students
do worse than one trained alone (64.60): 59.40 with vgg13 and 58.58 with resnet50 as the teacher.
Differences
- from the paper: it writes (beta / 2) |Q(f_s) - Q(f_t)|; the authors' code and most later code use the mean square.
- from the code: none in the loss.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import DistillArgs, Positive, Run, accuracy, build, cuda_graph, fail, feature_shapes, load_data, load_teacher


@dataclass
class Args(DistillArgs):
    teacher: str = "resnet56"
    student: str = "resnet20"
    epochs: int = 240
    batch_size: int = 64
    lr: float | None = None
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ce_weight: float = 1.0
    """weight of the cross-entropy with the labels"""
    kd_weight: float = 0.0
    """weight of the KD term"""
    kd_temperature: Positive = 4.0
    """softmax temperature of the KD term"""
    at_weight: float = 1000.0
    """weight of the attention term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s) of logits (B, C), summed over classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, dim=1)
    log_p_t = F.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, ...]:
    """Both maps (B, C, H, W) at the lower of their two resolutions; the larger is average-pooled."""
    side = min(f_s.shape[2], f_t.shape[2])
    return tuple(f if f.shape[2] == side else F.adaptive_avg_pool2d(f, side) for f in (f_s, f_t))


def attention(f: Tensor) -> Tensor:
    """Q of maps (B, C, H, W): unit vectors (B, H W)."""
    return F.normalize(f.square().mean(1).flatten(1), dim=1)


def at_loss(maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
    """L_at of the stages' maps, each (B, C, H, W)."""
    loss = 0
    for f_s, f_t in zip(maps_s, maps_t, strict=True):
        q_s, q_t = (attention(f) for f in same_side(f_s, f_t))
        loss = loss + (q_s - q_t).square().mean()  # because of the mean, a 32x32 map counts 1/16 as much as an 8x8 map
    return loss  # L_at


def main(args: Args) -> float:
    run = Run(__file__, args)  # prints the result and exits if this run is already finished
    train, test = load_data(args)
    teacher = load_teacher(run, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # the same initial student for every method
    student = build(args.student, train.classes, args.device)
    stages_s, stages_t = (len(feature_shapes(net, train.size).maps) - 1 for net in (student, teacher))
    if stages_s != stages_t:
        fail(f"AT compares stage by stage, but {args.student} has {stages_s} stages and {args.teacher} {stages_t}", 2)
    trained = nn.ModuleDict(dict(student=student)).to(args.device)  # optimized and checkpointed
    lr = args.lr or (0.01 if args.student in ("mobilenetv2", "shufflenetv1", "shufflenetv2") else 0.05)
    optimizer = SGD(trained.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    milestones = args.milestones or sorted({args.epochs * k // 8 for k in (5, 6, 7)} - {0})
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)

    @cuda_graph
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss_ce = F.cross_entropy(z_s, y)
        loss_kd = kd_loss(z_s, z_t, args.kd_temperature)
        loss_at = at_loss(features_s.maps[1:], features_t.maps[1:])
        loss = args.ce_weight * loss_ce + args.kd_weight * loss_kd + args.at_weight * loss_at

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return dict(loss=loss, ce=loss_ce, kd=loss_kd, at=loss_at, accuracy=(z_s.argmax(1) == y).float().mean())

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, scheduler=scheduler):  # resumes and saves
        trained.train()
        meter = run.meter(len(train))  # sums on the device, read once per epoch
        for x, y, index in train.epoch(epoch):
            meter.add(step(x, y, index), len(y))
        run.log(epoch, train=meter.mean(), test=accuracy(student, test))
        scheduler.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
