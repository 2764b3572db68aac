"""FitNet: FitNets: Hints for Thin Deep Nets. Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta and Bengio, 2015, arXiv 1412.6550.

A map in the middle of the teacher is a hint: the student's map at the same stage must predict it. A regressor of one
convolution, trained with the student and dropped afterwards, bridges the difference in channels and side.

    u      = ReLU(BN(conv(f_s)))                                                          Eq. 1
    L_hint = mean of (u - f_t)^2 over batch, channels and positions                       Eq. 2
    L      = r * CE + a * T^2 * KL(p_t || p_s) + beta * L_hint                            Eq. 3

r = 1, a = 0, beta = 100, maps f2 (f0 is the stem). conv has a 1x1 kernel where the sides are equal, 3x3 with stride 2 where
the student's side is twice the teacher's, transposed 4x4 with stride 2 where it is half, and takes away what the student's
has more otherwise. The equation numbers are ours.

Differences
- from the paper: one stage. The paper first trains the student up to the hint on half the squared norm of u - f_t alone, then
  the whole student by KD with a falling weight. The published CIFAR-100 numbers are one-stage.
- from RepDistiller's code (HobbitLong/RepDistiller, commit b84f547, distiller_zoo/FitNet.py, models/util.py): none.
- kept although odd: the ReLU in Eq. 1 cannot reach the negative values in the maps of wrn and mobilenetv2 teachers. The
  published accuracy is below the student's own for resnet110/resnet20, resnet110/resnet32, and vgg13 or resnet50/mobilenetv2.

    python methods/fitnet.py --teacher resnet56 --student resnet20
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
    fitnet_weight: float = 100.0
    """beta, weight of the hint term"""
    hint_stage: int = 2
    """whose maps are compared: 0 the stem, 1 the first stage, ..."""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def convolution(shape_s: tuple[int, int, int], shape_t: tuple[int, int, int]) -> nn.Module:
    """One that turns maps of shape_s (C, H, W) into maps of shape_t; ends the program if the student's are too small for that."""
    (c_s, side_s, _), (c_t, side_t, _) = shape_s, shape_t
    if side_s == 2 * side_t:
        return nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    if 2 * side_s == side_t:
        return nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    if side_s < side_t:
        fail(f"no regressor leads from {side_s}x{side_s} maps to the teacher's {side_t}x{side_t}: take another --hint-stage", 2)
    return nn.Conv2d(c_s, c_t, 1 + side_s - side_t)


class FitNet(nn.Module):
    """The hint term for maps f_s (B, C_s, H_s, W_s) and f_t (B, C_t, H_t, W_t); the regressor is trained."""

    def __init__(self, shape_s: tuple[int, int, int], shape_t: tuple[int, int, int]):
        super().__init__()
        self.conv = convolution(shape_s, shape_t)
        self.bn = nn.BatchNorm2d(shape_t[0])

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        u = F.relu(self.bn(self.conv(f_s)))  # Eq. 1
        return (u - f_t).square().mean()  # Eq. 2


def main(args: Args) -> float:
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    shapes_s, shapes_t = shapes(student).maps, shapes(teacher).maps
    stages = min(len(shapes_s), len(shapes_t))
    if not 0 <= args.hint_stage < stages:
        fail(f"--hint-stage {args.hint_stage}: {args.student} and {args.teacher} share the stages 0 to {stages - 1}", 2)
    fitnet = FitNet(shapes_s[args.hint_stage], shapes_t[args.hint_stage]).to(args.device)
    trained = nn.ModuleDict(dict(student=student, fitnet=fitnet))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        maps_s, maps_t = features_s.maps, features_t.maps
        loss = loss + args.fitnet_weight * fitnet(maps_s[args.hint_stage], maps_t[args.hint_stage])  # Eq. 3

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
