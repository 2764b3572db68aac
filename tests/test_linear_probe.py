"""benchmark/linear_probe.py: one step is plain SGD on the features, the student stays as it was, a resumed probe ends alike."""

import json
import signal
from pathlib import Path

import pytest
import torch
from golden import load
from torch import nn

probe = load("linear_probe", "benchmark")
import common

FULL = common.synthetic(Path(), None)
PROTOCOLS = list(probe.PROTOCOLS)


def few(data, size):
    """20 training and 30 test images."""
    return FULL._replace(train=tuple(part[:20] for part in FULL.train), test=tuple(part[:30] for part in FULL.test))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in; afterwards Ctrl-C does what it did before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(common.DATASETS, "synthetic", few)
    common.read.cache_clear()
    yield
    common.read.cache_clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def trained():
    """Weights of a resnet8 for 7 classes, with running statistics unlike their start; its state dict."""
    torch.manual_seed(7)
    net = common.build("resnet8", 7)
    with torch.no_grad():
        net(torch.randn(64, 3, 32, 32))
    torch.save(net.state_dict(), "trained.pt")
    return net.state_dict()


def args(protocol="frozen", **more):
    usual = dict(student="resnet8", weights=Path("trained.pt"), dataset="synthetic", device="cpu", batch_size=20, epochs=1)
    return probe.Args(protocol=protocol, **usual | more)


def outcome(runs="runs"):
    """Weights and result of the only run in a folder."""
    (folder,) = Path(runs).iterdir()
    state = torch.load(folder / "student.pt", weights_only=True)
    return state, json.loads((folder / "result.json").read_text()), folder


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_step_is_plain_sgd_on_the_features(trained, monkeypatch, protocol):
    monkeypatch.setattr(probe.transforms, "Compose", lambda steps: lambda image: image)  # hsakd's crops: the whole image
    monkeypatch.setitem(probe.PROTOCOLS["icd"], "weight_decay", 0.5)  # the protocol's own is lost in rounding
    flags = args(protocol)
    probe.main(flags)
    train, _ = common.load_data(flags)
    x, y, index = next(train.epoch(1))
    if protocol == "hsakd":
        x = torch.cat([x for x, _ in train.batches()])[index]
    student = common.build("resnet8", 7)
    student.load_state_dict(trained)
    student.double().train(protocol == "icd")
    f = student(x.double())[1].pooled.detach()

    torch.manual_seed(1)
    w = 0.01 * torch.randn(100, 64).double()
    p = (f @ w.T).exp() / (f @ w.T).exp().sum(1, keepdim=True)
    error = (p - torch.eye(100, dtype=torch.float64)[y]) / len(y)
    lr, decay, first = {"icd": (0.05, 0.5, 1), "frozen": (0.05, 0, 1), "hsakd": (0.1, 0, 1.9)}[protocol]  # Nesterov: 1 + 0.9
    state, *_ = outcome()
    torch.testing.assert_close(state["fc.weight"], (w - lr * first * (error.T @ f + decay * w)).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["fc.bias"], -(lr * first * error.sum(0)).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_student_stays_as_it_was(trained, protocol):
    probe.main(args(protocol, batch_size=8, epochs=2))
    state, result, _ = outcome()
    parameters = {name for name, _ in common.build("resnet8", 7).named_parameters()}
    moved = {name for name in trained if not name.startswith("fc.") and not torch.equal(state[name], trained[name])}
    statistics = trained.keys() - parameters
    assert moved == (statistics if protocol == "icd" else set())
    assert all(state[f"fc.{part}"].shape[0] == 100 for part in ("weight", "bias"))
    net = common.build("resnet8", 100)
    net.load_state_dict(state)
    assert result["last"] == common.accuracy(net, common.load_data(args())[1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_killed_probe_ends_as_one_that_was_not(trained, monkeypatch, protocol):
    flags = dict(epochs=3, milestones=(1,), batch_size=8)
    probe.main(args(protocol, runs=Path("whole"), **flags))
    write = common.write_checkpoint

    def write_and_die(path, state):
        write(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "write_checkpoint", write_and_die)
        patch.setattr(common, "SAVE_EVERY", 0)
        probe.main(args(protocol, **flags))
    probe.main(args(protocol, **flags))
    (state, result, folder), (whole, _, other) = outcome(), outcome("whole")
    assert result["resumed"] == 1 and all(torch.equal(state[name], whole[name]) for name in whole)
    rows = [[json.loads(row) | {"seconds": 0} for row in (run / "log.jsonl").open()] for run in (folder, other)]
    assert rows[0] == rows[1] and [round(row["lr"] / rows[0][0]["lr"], 6) for row in rows[0]] == [1, 0.1, 0.1]


@pytest.mark.parametrize("known", [True, False])
def test_the_record_says_which_network_was_probed(trained, known):
    digest = common.sha256(Path("trained.pt"))
    by = dict(method="icd", args={"kd_weight": 1.0}, last=70.5)
    if known:
        Path("trained.json").write_text(json.dumps(by | dict(student_sha256=digest, best=71)))
    probe.main(args())
    _, result, folder = outcome()
    assert f"weights={digest[:8]}" in folder.name and "protocol=frozen" in folder.name
    assert result["args"]["weights_sha256"] == digest and result["args"]["trained_by"] == (by if known else None)


def unlike_its_record():
    Path("trained.json").write_text(json.dumps(dict(method="kd", student_sha256="0" * 64)))


@pytest.mark.parametrize(
    "spoil, code, message",
    [
        (lambda: Path("trained.pt").unlink(), 2, "--weights trained.pt is not a file"),
        (lambda: Path("trained.pt").write_bytes(b"PK\3\4"), 1, "is not a checkpoint that torch can read"),
        (lambda: torch.save([1], "trained.pt"), 1, "holds no state dict"),
        (lambda: torch.save(common.build("resnet14", 7).state_dict(), "trained.pt"), 1, "another network's weights"),
        (lambda: torch.save(nn.Linear(64, 7).state_dict(), "trained.pt"), 1, "another network's weights"),
        (unlike_its_record, 1, "is damaged"),
    ],
)
def test_wrong_weights_give_one_line(trained, capsys, spoil, code, message):
    spoil()
    with pytest.raises(SystemExit) as end:
        probe.main(args())
    error = capsys.readouterr().err
    assert end.value.code == code and message in error and error.count("\n") == 1
