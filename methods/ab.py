"""AB: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons. Heo, Lee, Yun and Choi, 2019,
arXiv 1811.03233.

Which neurons fire on an image matters more than how strongly. In a first stage each of the student's neurons is pushed, with
a margin, to that side of zero on which the teacher's is; in the second the student learns the labels.

    u, v = connector(student's map), teacher's map at the end of a stage, both before the ReLU               Eq. 1
    l    = max(0, m + u)^2 where v <= 0,   max(0, m - u)^2 where v > 0                                       Eq. 2
    L_ab = sum over stages k = 1 ... n of  2^(k - n) / B * sum over images, channels and positions of l      Eq. 3
    L    = w * L_ab in stage 1,   r * CE + a * T^2 * KL(p_t || p_s) in stage 2                               Eq. 4

w = 3/1000, m = 1, r = 1, a = 0. The connector is nothing where the shapes agree; else a convolution and a batch norm: 1x1 where
the sides are equal, 3x3 with stride 2 where the student's side is twice the teacher's, transposed 4x4 with stride 2 where it
is half, else as in fitnet.py. Stage 1 lasts 30 epochs, at the student's learning rate. The equation numbers are ours.

Differences
- from the paper: none in l, a differentiable stand-in for its count of neurons on different sides of zero; w and the weights
  2^(k - n) are the code's.
- from the authors' code (bhheo/AB_distillation, commit a7701d3): there stage 2 is KD alone (T = 3, without T^2), the teacher
  is in train mode in stage 1, and every stage has a connector with a 1x1 convolution.
- from RepDistiller's code (HobbitLong/RepDistiller, commit b84f547, distiller_zoo/AB.py): none in the loss. Its flag -b has no
  effect on AB; --ab-weight has one.
- kept although odd: what lies behind the last map is neither trained in stage 1 nor in train mode. In a wrn that is also the
  batch norm through which u of the last stage comes; at its initial statistics it passes the map on as it is.

    python methods/ab.py --teacher resnet56 --student resnet20
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
from common import Run, accuracy, build, fail, graphed, load_data, load_teacher, shapes


@dataclass
class Args:
    teacher: str = "resnet56"
    """the trained network to learn from, a name in common.NETWORKS"""
    student: str = "resnet20"
    """the network to train, a name in common.NETWORKS"""
    dataset: str = "cifar100"
    """cifar100, cifar10, or synthetic (small, nothing to download)"""
    data: Path = Path("data")
    """folder of the data sets"""
    runs: Path = Path("runs")
    """folder in which this run makes its own"""
    seed: int = 1
    """seed of the weights, the order of the images and their views"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, ... or cpu"""
    teacher_weights: Path | None = None
    """checkpoint of the teacher; by default one in teachers/, else a run of methods/vanilla.py, which is started if need be"""
    epochs: int = 240
    """passes over the training images"""
    batch_size: int = 64
    """images a step; the last, smaller batch of an epoch is kept"""
    lr: float | None = None
    """learning rate at the start; by default 0.05, but 0.01 for mobilenetv2, shufflenetv1 and shufflenetv2"""
    milestones: tuple[int, ...] | None = None
    """epochs after which the learning rate falls to a tenth; by default 5/8, 6/8 and 7/8 of all"""
    weight_decay: float = 5e-4
    """on all parameters, those of batch norm and of auxiliary modules too"""
    ce_weight: float = 1.0
    """r, weight of the cross-entropy with the labels"""
    kd_weight: float = 0.0
    """a, weight of the KD term"""
    kd_temperature: float = 4.0
    """T, by which both networks' logits are divided in the KD term"""
    ab_weight: float = 0.003
    """w, weight of the AB term, the whole loss of stage 1"""
    margin: float = 1.0
    """m, how far from zero a student's neuron must be"""
    init_epochs: int = 30
    """passes over the training images in stage 1"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def connector(shape_s: tuple[int, int, int], shape_t: tuple[int, int, int]) -> nn.Module:
    """Turns maps of shape_s (C, H, W) into maps of shape_t; ends the program if the student's are too small for that."""
    (c_s, side_s, _), (c_t, side_t, _) = shape_s, shape_t
    if shape_s == shape_t:
        return nn.Identity()
    if side_s == 2 * side_t:
        convolution = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    elif 2 * side_s == side_t:
        convolution = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    elif side_s >= side_t:
        convolution = nn.Conv2d(c_s, c_t, 1 + side_s - side_t)
    else:
        fail(f"AB has no connector from the student's {side_s}x{side_s} map to the teacher's {side_t}x{side_t}", 2)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_t))


class AB(nn.Module):
    """The AB term for the stages' maps before their ReLU, (B, C, H, W) each; the connectors are trained."""

    def __init__(self, shapes_s: list[tuple[int, int, int]], shapes_t: list[tuple[int, int, int]], margin: float = 1.0):
        super().__init__()
        self.connectors = nn.ModuleList(connector(s, t) for s, t in zip(shapes_s, shapes_t, strict=True))
        self.margin = margin

    def forward(self, preacts_s: list[Tensor], preacts_t: list[Tensor]) -> Tensor:
        loss, n = 0, len(self.connectors)
        for k, (connect, f_s, v) in enumerate(zip(self.connectors, preacts_s, preacts_t, strict=True), start=1):
            u = connect(f_s)  # Eq. 1
            distance = torch.where(v > 0, F.relu(self.margin - u), F.relu(self.margin + u))  # Eq. 2
            loss = loss + 2 ** (k - n) / len(u) * distance.square().sum()  # Eq. 3
        return loss


def behind_maps(net: nn.Module, device: str) -> nn.ModuleList:
    """The modules of `net` on whose parameters no stage's map depends: the classifier and what lies before it."""
    _, features = net.eval()(torch.zeros(1, 3, 32, 32, device=device))
    gradients = torch.autograd.grad(features.maps[-1].sum(), list(net.parameters()), allow_unused=True)
    behind = {p for p, gradient in zip(net.parameters(), gradients) if gradient is None}
    return nn.ModuleList(m for m in net.modules() if any(p in behind for p in m.parameters(recurse=False)))


def main(args: Args) -> float:
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    shapes_s, shapes_t = shapes(student).preacts[1:], shapes(teacher).preacts[1:]
    if len(shapes_s) != len(shapes_t):
        fail(f"AB compares stage by stage: {args.student} has {len(shapes_s)} stages, {args.teacher} {len(shapes_t)}", 2)
    ab = AB(shapes_s, shapes_t, args.margin).to(args.device)

    behind = behind_maps(student, args.device).requires_grad_(False)
    init = nn.ModuleDict(dict(student=student, ab=ab))  # what stage 1 trains
    init_optimizer = SGD(init.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    init_schedule = MultiStepLR(init_optimizer, [], gamma=0.1)

    @graphed
    def init_step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
        _, features_s = student(x)

        loss = args.ab_weight * ab(features_s.preacts[1:], features_t.preacts[1:])  # Eq. 4

        init_optimizer.zero_grad()
        loss.backward()
        init_optimizer.step()
        return (loss.detach() * len(y))[None]

    for epoch in run.epochs(args.init_epochs, trained=init, optimizer=init_optimizer, schedule=init_schedule, phase="init"):
        init.train()
        behind.eval()
        sums = sum(init_step(*batch) for batch in train.epoch(epoch, phase="init"))
        run.log(epoch, sums / len(train), None, init_schedule)
        init_schedule.step()
    behind.requires_grad_(True)

    trained = nn.ModuleDict(dict(student=student))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        z_s, _ = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        if args.kd_weight:  # stage 2 needs the teacher for nothing else
            with torch.no_grad():
                z_t, _ = teacher(x)
            loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in train.epoch(epoch))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule)
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
