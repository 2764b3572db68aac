"""IE-DML: inheritance and exploration in mutual learning. After Huang, Shen, Xing et al., Revisiting Knowledge Distillation: An
Inheritance and Exploration Framework, CVPR 2021, arXiv 2107.00181, which has it in its Table 4.

Student and peer start untrained and learn in turns, each from the labels, the other's predictions (as in DML, arXiv
1706.00384) and the other's last map, compressed to a factor: one half of a network's channels has to reproduce that factor, the
other half has to differ from it. For the network k and the other one, o, which has just been updated and gets no gradient:

    D(F, G) = mean over images and elements of | F/||F|| - G/||G|| |              Eq. 1
    L_inh   =  D(E_inh,k(f_inh,k), E_o(f_o)),   f_inh the first half of f          Eq. 2
    L_exp   = -D(E_exp,k(f_exp,k), E_o(f_o)),   f_exp the second half of f         Eq. 3
    L_rec   = mean |f_k - D_k(E_k(f_k))|,       trains E_k and D_k, not f_k        Eq. 4
    L_k     = r * CE + a * T^2 * KL(p_o || p_k) + lambda_inh * L_inh + lambda_exp * L_exp + L_rec      Eq. 5

r = a = T = 1, lambda_inh = lambda_exp = 50; f is the map that is pooled into the classifier. The equation numbers are ours.

Differences
- from the paper: not compared but for its abstract; that the two are trained in turns is told by others, the rest is ours.
  Whether the paper keeps the KL is not known: --kd-weight 0 leaves it out.
- from the authors' code (aliyun/Revisiting-Knowledge-Distillation-an-Inheritance-and-Exploration-Framework, commit 3274ab0): it
  has DML but no IE-DML. Terms, coders and recipe are those of its IE-KD: see ie_kd.py, also for what differs and its weakness.
- ours: all factors have half as many channels as the student; of two that differ in side the larger one is average-pooled. The
  peer learns first; its second pass, for fresh predictions, moves its batch statistics and both encoders' once more.

The test accuracy is the student's, the log has the peer's beside it. Compare with two plain runs, which cost somewhat less.

    python methods/ie_dml.py --peer resnet20 --student resnet20
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import Run, accuracy, build, graphed, load_data, shapes


@dataclass
class Args:
    drops: ClassVar[tuple[float, ...]] = (1 / 2, 3 / 4)  # the default milestones, as parts of the epochs
    peer: str = "resnet20"
    """the network trained beside the student, a name in common.NETWORKS"""
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
    epochs: int = 160
    """passes over the training images"""
    batch_size: int = 128
    """images a step; the last, smaller batch of an epoch is kept"""
    lr: float | None = 0.1
    """learning rate at the start"""
    milestones: tuple[int, ...] | None = None
    """epochs after which the learning rate falls to a tenth; by default 1/2 and 3/4 of all"""
    weight_decay: float = 5e-4
    """on all parameters, those of batch norm and of auxiliary modules too"""
    ce_weight: float = 1.0
    """r, weight of the cross-entropy with the labels"""
    kd_weight: float = 1.0
    """a, weight of the KL to the other network's predictions"""
    kd_temperature: float = 1.0
    """T, by which both networks' logits are divided in the KL"""
    inheritance_weight: float = 50.0
    """lambda_inh, weight of the inheritance term; 0 leaves exploration only"""
    exploration_weight: float = 50.0
    """lambda_exp, weight of the exploration term; 0 leaves inheritance only"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class Coder(nn.Sequential):
    """Encoder or decoder: maps (B, c_in, H, W) to (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int):
        layers: list[nn.Module] = [nn.LeakyReLU(0.1)]  # as released; it changes no map that comes out of a ReLU
        for c, c_next in (c_in, c_in), (c_in, c_out), (c_out, c_out):
            layers += [nn.Conv2d(c, c_next, 3, padding=1, bias=False), nn.BatchNorm2d(c_next), nn.LeakyReLU(0.1)]
            nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
        super().__init__(*layers)


def distance(f: Tensor, g: Tensor) -> Tensor:
    """D of two factors (B, C, H, W), which may differ in side: from 0 to 2 / sqrt(C * H * W)."""
    side = min(f.shape[-1], g.shape[-1])
    f, g = (F.adaptive_avg_pool2d(factor, side) if factor.shape[-1] > side else factor for factor in (f, g))
    return (F.normalize(f.flatten(1), dim=1) - F.normalize(g.flatten(1), dim=1)).abs().mean()  # Eq. 1


class IEDML(nn.Module):
    """What a network with a map of c channels trains beside itself: E and D, E_inh and E_exp; factors have `width` channels."""

    def __init__(self, c: int, width: int):
        super().__init__()
        self.half = c // 2
        self.encode, self.decode = Coder(c, width), Coder(width, c)
        self.encode_inh, self.encode_exp = Coder(self.half, width), Coder(c - self.half, width)

    def forward(self, f: Tensor, factor_o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L_inh, L_exp and L_rec of the network's map (B, c, H, W) and the other one's factor (B, width, H', W')."""
        inheritance = distance(self.encode_inh(f[:, : self.half]), factor_o)  # Eq. 2
        exploration = -distance(self.encode_exp(f[:, self.half :]), factor_o)  # Eq. 3
        reconstruction = F.l1_loss(self.decode(self.encode(f.detach())), f.detach(), reduction="mean")  # Eq. 4
        return inheritance, exploration, reconstruction


def main(args: Args) -> float:
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args, padding="reflect")

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    peer = build(args.peer, train.classes, args.device)
    c_s, c_p = shapes(student).last[0], shapes(peer).last[0]
    iedml_s, iedml_p = IEDML(c_s, c_s // 2).to(args.device), IEDML(c_p, c_s // 2).to(args.device)
    trained = nn.ModuleDict(dict(student=student, iedml_s=iedml_s, peer=peer, iedml_p=iedml_p))
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    def objective(iedml, z, f, z_o, factor_o, y):
        inheritance, exploration, reconstruction = iedml(f, factor_o)
        loss = args.ce_weight * F.cross_entropy(z, y)
        loss = loss + args.kd_weight * kd_loss(z, z_o, args.kd_temperature)
        loss = loss + args.inheritance_weight * inheritance + args.exploration_weight * exploration
        return loss + reconstruction  # Eq. 5

    @graphed
    def step(x, y, index):
        z_s, features_s = student(x)
        z_p, features_p = peer(x)
        with torch.no_grad():
            factor_s = iedml_s.encode(features_s.last)
        optimizer.zero_grad()  # to None: this step moves only what has a gradient, the peer and its coders
        objective(iedml_p, z_p, features_p.last, z_s.detach(), factor_s, y).backward()
        optimizer.step()

        with torch.no_grad():
            z_p, features_p = peer(x)
            factor_p = iedml_p.encode(features_p.last)
        loss = objective(iedml_s, z_s, features_s.last, z_p, factor_p, y)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in train.epoch(epoch))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule, peer=accuracy(peer, test))
        schedule.step()
    return run.finish(student)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
