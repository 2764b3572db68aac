"""VID: Variational Information Distillation for Knowledge Transfer. Ahn, Hu, Damianou, Lawrence and Dai, 2019, arXiv 1904.05835.

The student should keep as much information about the teacher's maps as it can. A lower bound of that mutual information is
the likelihood of the teacher's map under a Gaussian whose mean is computed from the student's map and whose variance, one
per channel, is learned: channels that the student cannot predict come to cost little.

    mu(f)     = three 1x1 convolutions without bias, C_s -> C_t -> C_t -> C_t, ReLU between                 Eq. 1
    sigma_c^2 = softplus(alpha_c) + 1e-5,   5.0 at the start                                                Eq. 2
    L_vid     = sum over stages 1 ... k of the mean of [(mu(f_s) - f_t)^2 / sigma_c^2 + ln sigma_c^2] / 2   Eq. 3
    L         = r * CE + a * T^2 * KL(p_t || p_s) + beta * L_vid                                            Eq. 4

r = 1, a = 0, beta = 1; the mean is over batch, channels and positions. Where the maps of a stage differ in side, the larger
one is average-pooled first. L_vid can be negative, by the logarithm. The equation numbers are ours.

Differences
- from the paper: it sums over channels and positions, so its weights are of another scale.
- from RepDistiller's code (HobbitLong/RepDistiller, commit b84f547, distiller_zoo/VID.py): none in value; softplus replaces
  ln(1 + exp(alpha)), which overflows for a large alpha.
- from mdistiller's code (megvii-research/mdistiller, commit a08d46f): there alpha is in no optimiser and stays where it
  starts, which makes each stage's term 0.1 * MSE + 0.805; here it is trained.

    python methods/vid.py --teacher resnet56 --student resnet20
"""

import math
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
    vid_weight: float = 1.0
    """beta, weight of the information term"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B, C_s, H_s, W_s) and (B, C_t, H_t, W_t), the larger ones average-pooled to the side of the smaller ones."""
    side_s, side_t = f_s.shape[2], f_t.shape[2]
    if side_s > side_t:
        f_s = F.adaptive_avg_pool2d(f_s, side_t)
    elif side_t > side_s:
        f_t = F.adaptive_avg_pool2d(f_t, side_s)
    return f_s, f_t


def regressor(c_s: int, c_t: int) -> nn.Module:
    """mu, from maps (B, c_s, H, W) to (B, c_t, H, W)."""
    first, second, third = (nn.Conv2d(c_in, c_t, 1, bias=False) for c_in in (c_s, c_t, c_t))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)  # Eq. 1


class VID(nn.Module):
    """The information term for the maps of the stages, (B, C, H, W) each; means mu and variances are trained.

    `channels_s`, `channels_t`: the stages' C, as many of the student as of the teacher.
    """

    def __init__(self, channels_s: list[int], channels_t: list[int], init_variance: float = 5.0, eps: float = 1e-5):
        super().__init__()
        self.mu = nn.ModuleList(regressor(c_s, c_t) for c_s, c_t in zip(channels_s, channels_t, strict=True))
        start = math.log(math.expm1(init_variance - eps))
        self.alpha = nn.ParameterList(torch.full((c_t,), start) for c_t in channels_t)
        self.eps = eps

    def variance(self, stage: int) -> Tensor:
        """sigma^2 (C_t, 1, 1) of a stage, counted from 0."""
        return F.softplus(self.alpha[stage])[:, None, None] + self.eps  # Eq. 2

    def forward(self, maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
        terms = []
        for stage, mu in enumerate(self.mu):
            f_s, f_t = same_side(maps_s[stage], maps_t[stage])
            variance = self.variance(stage)
            terms.append(((mu(f_s) - f_t).square() / variance + variance.log()).mean() / 2)  # Eq. 3
        return sum(terms)


def main(args: Args) -> float:
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    channels_s, channels_t = ([c for c, _, _ in shapes(net).maps[1:]] for net in (student, teacher))
    if len(channels_s) != len(channels_t):
        fail(f"VID compares stage by stage: {args.student} has {len(channels_s)} stages, {args.teacher} {len(channels_t)}", 2)
    vid = VID(channels_s, channels_t).to(args.device)
    trained = nn.ModuleDict(dict(student=student, vid=vid))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
        z_s, features_s = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        loss = loss + args.vid_weight * vid(features_s.maps[1:], features_t.maps[1:])  # Eq. 4

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in train.epoch(epoch))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule, variance=vid.variance(-1).mean())
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
