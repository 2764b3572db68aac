"""FT: Paraphrasing Complex Network: Network Compression via Factor Transfer. Kim, Park and Kwak, 2018, arXiv 1802.04977.

A teacher's raw map may be more than a student can follow. In a first stage an auto-encoder on it, the paraphraser, learns to
put it in fewer channels, its factor. In the second the student is trained so that a translator finds the factor in its map.

    L_rec = mean of (decoder(encoder(f_t)) - f_t)^2, the loss of stage 1                       Eq. 1
    Q(F)  = n(mean over channels of F^2) as a vector of H * W positions,   n(v) = v / |v|      Eq. 2
    L_ft  = mean of |Q(translator(f_s)) - Q(encoder(f_t))| over batch and positions            Eq. 3
    L     = r * CE + a * T^2 * KL(p_t || p_s) + beta * L_ft, the loss of stage 2               Eq. 4

r = 1, a = 0, beta = 200, f the last stage's map. Encoder: 3x3 convolutions C -> C -> C/2 -> C/2 of the teacher's C channels;
the decoder mirrors it with transposed ones, the translator is the encoder from the student's channels and with batch norm. Where
the factors differ in side, the larger one is average-pooled first. Stage 1 lasts 30 epochs, at the learning rate 0.01 if the
student is a resnet or wrn, else at the student's. The equation numbers are ours.

Differences
- from the paper, whose authors' code is Jangho-Kim/Factor-Transfer-pytorch, commit 19cce26: Q(F) = n(F) with all channels
  and beta = 500 there, the mean of absolute values in Eq. 1, and no batch norm in the translator. --ft-variant original takes
  all but beta, which --ft-weight 500 sets, on the schedule of the other variant.
- from RepDistiller's code (HobbitLong/RepDistiller, commit b84f547, distiller_zoo/FT.py, models/util.py): none.
- kept although odd: Eq. 2, RepDistiller's, is AT's and blind to the sign of the factor.

    python methods/ft.py --teacher resnet56 --student resnet20
    python methods/ft.py --teacher resnet56 --student resnet20 --ft-variant original --ft-weight 500
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import Run, accuracy, build, graphed, load_data, load_teacher, shapes


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
    ft_weight: float = 200.0
    """beta, weight of the FT term; take 500 for the original variant"""
    ft_variant: Literal["repdistiller", "original"] = "repdistiller"
    """repdistiller, behind the published CIFAR-100 numbers, or original, the paper's"""
    init_epochs: int = 30
    """passes over the training images in stage 1"""


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


def coder(channels: list[int], convolution: type[nn.Module], batch_norm: bool = False) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next, with LeakyReLU."""
    layers = []
    for c_in, c_out in pairwise(channels):
        norm = nn.BatchNorm2d(c_out) if batch_norm else nn.Identity()
        layers += [convolution(c_in, c_out, 3, padding=1), norm, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """The auto-encoder of the teacher's maps (B, C, H, W); its code is the factor (B, C // 2, H, W)."""

    def __init__(self, c_t: int):
        super().__init__()
        self.encoder = coder([c_t, c_t, c_t // 2, c_t // 2], nn.Conv2d)
        self.decoder = coder([c_t // 2, c_t // 2, c_t, c_t], nn.ConvTranspose2d)

    def forward(self, f_t: Tensor) -> Tensor:
        """The maps as reconstructed from their factor."""
        return self.decoder(self.encoder(f_t))


def unit(factor: Tensor, variant: str) -> Tensor:
    """Q of factors (B, C, H, W): unit vectors (B, H * W), or (B, C * H * W) in the original variant."""
    vector = factor if variant == "original" else factor.square().mean(1)
    return F.normalize(vector.flatten(1), dim=1)  # Eq. 2


def ft_loss(factor_s: Tensor, factor_t: Tensor, variant: str = "repdistiller") -> Tensor:
    """The FT term for factors (B, C, H_s, W_s) and (B, C, H_t, W_t)."""
    factor_s, factor_t = same_side(factor_s, factor_t)
    return (unit(factor_s, variant) - unit(factor_t, variant)).abs().mean()  # Eq. 3


def main(args: Args) -> float:
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    c_s, c_t = shapes(student).maps[-1][0], shapes(teacher).maps[-1][0]
    paraphraser = Paraphraser(c_t).to(args.device)
    translator = coder([c_s, c_s, c_t // 2, c_t // 2], nn.Conv2d, batch_norm=args.ft_variant == "repdistiller").to(args.device)

    init_lr = 0.01 if args.student.startswith(("resnet", "wrn")) else args.lr
    init = nn.ModuleDict(dict(paraphraser=paraphraser))  # what stage 1 trains
    init_optimizer = SGD(init.parameters(), init_lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    init_schedule = MultiStepLR(init_optimizer, [], gamma=0.1)

    @graphed
    def init_step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)

        error = paraphraser(features_t.maps[-1]) - features_t.maps[-1]
        loss = error.abs().mean() if args.ft_variant == "original" else error.square().mean()  # Eq. 1

        init_optimizer.zero_grad()
        loss.backward()
        init_optimizer.step()
        return (loss.detach() * len(y))[None]

    for epoch in run.epochs(
        args.init_epochs, trained=init, optimizer=init_optimizer, schedule=init_schedule, phase="paraphraser"
    ):
        init.train()
        sums = sum(init_step(*batch) for batch in train.epoch(epoch, phase="paraphraser"))
        run.log(epoch, sums / len(train), None, init_schedule)
        init_schedule.step()
    paraphraser.requires_grad_(False)

    trained = nn.ModuleDict(dict(student=student, translator=translator))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            z_t, features_t = teacher(x)
            factor_t = paraphraser.encoder(features_t.maps[-1])
        z_s, features_s = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)
        factor_s = translator(features_s.maps[-1])
        loss = loss + args.ft_weight * ft_loss(factor_s, factor_t, args.ft_variant)  # Eq. 4

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
