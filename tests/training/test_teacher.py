"""`--teacher`: a step against the same by hand, exact resume, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch

from pipelines.batch import Batch
from pipelines.normalize import MEAN_STD
from pipelines.utils.errors import DataError, UsageError
from rsnet.checkpoint import io
from rsnet.checkpoint.checkpoint import Checkpoint
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig
from rsnet.losses import loss_terms, teacher_distillation
from rsnet.models.factory import create_model
from rsnet.models.published import find
from rsnet.models.switchable import ResolutionSwitchable
from rsnet.models.teacher import Teacher
from rsnet.release.from_run import release_run
from rsnet.train import _spec
from rsnet.training.mixup import Mixup
from rsnet.training.objective import Objective
from rsnet.training.optim import LrSchedule, make_sgd
from rsnet.training.state import training_state
from rsnet.training.teacher import TeacherSource, make_teacher, outputs_for, read_teacher
from rsnet.training.trainer import Trainer, make_trainer
from tests.helpers import faults
from tests.helpers.runs import NETWORK, write_run
from tests.helpers.synthetic_run import train

SIZES, OWN = (16, 8), 12
CPU = torch.device("cpu")
WIDE = NETWORK | {"sizes": [OWN, 10], "stem": "small", "classes": ["2", "0", "1"]}


def _model(seed: int, sizes=SIZES) -> ResolutionSwitchable:
    torch.manual_seed(seed)
    return create_model(ModelConfig("parallel_resnet10", 5, sizes, width_mult=0.125, stem="small"))


def _batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            tuple(torch.randn(4, 3, s, s, generator=generator) for s in (*SIZES, OWN)),
            torch.randint(0, 5, (4,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("chosen", [None, (16,)])
def test_a_step_is_that_of_student_and_teacher_by_hand(chosen):
    """Two batches an update, mixed; the student normalises by ImageNet's pixels, the teacher by none."""
    model, twin, frozen = _model(0), _model(0), _model(1, (OWN,)).eval()
    teacher = Teacher(_model(1, (OWN,)).eval(), (OWN,), (*SIZES, OWN))
    teacher.renormalize(MEAN_STD["imagenet"], MEAN_STD["unit"])
    mix = Mixup(0.4, 0.0, 5, 0)
    trainer = Trainer(
        Objective(model, "ens_topdown", 0.1, teacher_weight=0.7, temperature=2.0),
        make_sgd(model, 0.1, 0.9, 1e-3),
        LrSchedule(0.1, "schedule", 10, 10),
        CPU,
        accumulate=2,
        mix=mix,
        teacher=teacher,
        sizes_at=lambda _: chosen,
    )
    trainer.objective.train()
    twin.train()
    sizes = chosen or SIZES
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in MEAN_STD["imagenet"])
    losses = []
    for i, batch in enumerate(_batches(2)):
        found = trainer.forward_backward(batch, last=i == 1)
        images, labels, _ = mix(batch, i)
        logits = twin.forward_all(images[: len(sizes)], sizes)
        with torch.no_grad():
            t = frozen((images[-1] * std + mean) / 255).double() / 2
        terms = loss_terms(logits, labels, twin.alpha[: len(sizes)], sizes, "ens_topdown", 0.1)
        p = t.softmax(1)
        pairs = [(p * (p.log() - (z.double() / 2).log_softmax(1))).sum(1).mean() for z in logits]
        taught = 0.7 * 2**2 * sum(pairs)
        assert found["kd/teacher"].item() == pytest.approx(taught.item(), rel=1e-4)
        losses.append((terms["total"] + taught) / 2)
        assert found["total"].item() == pytest.approx(2 * losses[-1].item(), rel=1e-5)
    sum(losses).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_knows_nothing_of_the_teacher():
    model = _model(0)
    teacher = Teacher(_model(1, (OWN,)).eval(), (OWN,), (*SIZES, OWN))
    states, before = [], {k: v.clone() for k, v in teacher.state_dict().items()}
    for taught in (None, teacher):
        sgd, schedule = make_sgd(model, 0.1, 0.9, 0.0), LrSchedule(0.1, "schedule", 10, 10)
        trainer = Trainer(Objective(model, "ens"), sgd, schedule, CPU, teacher=taught)
        trainer.objective.train()
        trainer.forward_backward(_batches(1)[0], last=True)
        trainer.update()
        states.append(training_state(trainer, model))
    for name in ("model", "optimizer"):
        assert states[0][name].keys() == states[1][name].keys()
    counts = [len(state["optimizer"]["state"]) for state in states]
    assert counts == [len(list(model.parameters()))] * 2
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A run whose network may teach; not to be changed."""
    return write_run(tmp_path_factory.mktemp("wide") / "run", WIDE)


def _config(**more) -> TrainConfig:
    return TrainConfig(data=Path("x"), **more)


def _read(teacher, previous=None, **more) -> tuple[TrainConfig, TeacherSource]:
    config, source = read_teacher(
        _config(teacher=str(teacher), **more), previous or {}, lambda _: None
    )
    assert source is not None
    return config, source


def test_a_run_its_checkpoint_and_its_release_are_one_teacher(wide, tmp_path):
    release_run(wide, tmp_path / "release")
    found = [_read(path) for path in (wide, wide / "checkpoints" / "best.pt", tmp_path / "release")]
    assert len({source.digest for _, source in found}) == 1
    for config, source in found:
        assert config.teacher.endswith(f"@sha256:{source.digest}")
        assert (config.teacher_size, source.sizes) == (str(OWN), (OWN,))
        assert source.build().sizes == (OWN,)
    config, source = _read(wide, teacher_size="ensemble")
    assert (config.teacher_size, source.sizes) == ("ensemble", (OWN, 10))


def test_weights_that_changed_since_are_not_the_runs_teacher(wide, tmp_path):
    pinned = _read(wide)[0].teacher
    assert _read(pinned)[0].teacher == pinned
    # As a resumed run has it, without the option.
    config, source = read_teacher(_config(), {"teacher": pinned, "teacher_size": "10"}, print)
    assert config.teacher is None
    assert source.sizes == (10,)
    other = write_run(tmp_path / "other", WIDE | {"width_mult": 0.125})
    moved = pinned.replace(str(wide), str(other))
    with pytest.raises(UsageError, match=r"--teacher .*/other: its weights are not those"):
        _read(moved)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_a_run_teaches_sigmoids_by_what_it_was_trained_for(tmp_path, loss):
    run = write_run(tmp_path / "run", WIDE, config={"loss": loss})
    given, source = _read(run, loss="bce", sizes=SIZES)
    config = resolve(given, world_size=1, device_type="cpu", has_bf16=False)
    network, said = ModelConfig("parallel_resnet10", 3, SIZES, classes=("0", "1", "2")), []
    teacher = make_teacher(source, config, network, CPU, said.append)
    what = {"ce": "a softmax", "bce": "sigmoids"}[loss]
    assert said == [f"--loss bce: the logits of --teacher {run} are taken for those of {what}"]
    model, (batch,), logits = _model(0), _batches(1), torch.randn(4, 5)
    objective = make_trainer(config, model, 5, 4, CPU, teacher=teacher).objective.eval()
    found = objective(batch.images[: len(SIZES)], batch.labels, teacher=logits)["kd/teacher"]
    students = model.forward_all(batch.images[: len(SIZES)])
    expected = teacher_distillation(students, logits, loss="bce", teacher_loss=loss)
    torch.testing.assert_close(found, expected)


def test_of_timms_recipes_the_name_says_which_are_of_binary_cross_entropy():
    names = (
        "timm/resnet50",
        "timm/resnet152.a1h_in1k",
        "timm/resnet18.tv_in1k",
        "timm/test_resnet:x.pth",
    )
    assert [find(name, "--teacher").loss for name in (*names, "resnet50")] == [
        "bce",
        "bce",
        "ce",
        "ce",
        "ce",
    ]


@pytest.mark.parametrize("scale", [1.0, 0.875])
@pytest.mark.parametrize("size", ["10", "12", "ensemble"])
def test_the_loader_makes_the_pictures_where_the_teacher_looks_for_them(wide, size, scale):
    """Also where its size is one of those that are trained, but on smaller images."""
    given, source = _read(wide, teacher_size=size, sizes=(16, 12, 8), train_size_scale=scale)
    config = resolve(given, world_size=1, device_type="cpu", has_bf16=False)
    made = _spec(config, CPU, source).of_split(training=True).all_sizes
    network = ModelConfig("parallel_resnet10", 3, (16, 12, 8), classes=("0", "1", "2"))
    teacher = make_teacher(source, config, network, CPU, print)
    assert tuple(made[place] for place in teacher.places) == source.sizes
    assert made[:3] == config.train_sizes
    assert len(set(made[3:]) | set(source.sizes)) == len(source.sizes)


@pytest.mark.parametrize(
    ("known", "names", "expected"),
    [
        (["c", "a", "b"], ["a", "b", "c"], [1, 2, 0]),
        ([], ["0", "1", "10", *"23456789"], [0, 1, 10, *range(2, 10)]),
        ([], ["ant", "bee"], [0, 1]),
        (["b", "a"], ["a", "b", None], [1, 0, 2]),
    ],
)
def test_classes_are_matched_by_their_names(known, names, expected):
    """Folders of the numbers of outputs, too. None: an output without a name."""
    count, classes = len(names), [n for n in names if n]
    source = TeacherSource("", None, {}, (8,), None, count, tuple(known))  # type: ignore[arg-type]
    outputs, note = outputs_for(source, classes, count, "it")
    assert outputs == expected
    assert note == (
        "" if known else f"note: --teacher it does not name its classes: {_TAKEN[names[0]]}"
    )


_TAKEN = {
    "ant": "they are taken to be --data's, in their order",
    "0": "the folders' names are taken for the numbers of its outputs",
}


@pytest.mark.parametrize("names", [("ant", "bee", "cat"), ("0", "1", "2")])
def test_of_a_network_without_names_is_said_what_is_assumed_and_what_shows_it(tmp_path, names):
    run = write_run(tmp_path / "run", WIDE | {"classes": []})
    _, source = _read(run)
    _, note = outputs_for(source, names, 3, str(run))
    assert note.startswith(f"note: --teacher {run} does not name its classes: {_TAKEN[names[0]]}; ")
    assert note.endswith(f": rsnet evaluate {run} --data DATA")
    with pytest.raises(UsageError, match="has 3 classes, and the network that is trained 2;"):
        outputs_for(source, names[:2], 2, str(run))


@pytest.mark.parametrize(
    ("known", "classes", "count", "message"),
    [
        ([], ["a", "b"], 1000, "has 1000 classes, and the network that is trained 2; train the teacher on"),
        (["a", "c"], ["a", "b"], 2, "has other classes than --data: b, c"),
        ([], ["n00000001", "n00000002"], 2, "does not name its 2 classes, and those of --data are not Ima"),
    ],
)  # fmt: skip
def test_other_classes_are_refused_in_a_line(known, classes, count, message):
    source = TeacherSource("", None, {}, (8,), None, count, tuple(known))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"^--teacher it {re.escape(message)}"):
        outputs_for(source, classes, 2, "it")


def test_a_network_of_a_library_teaches_with_the_weights_of_a_file(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3).eval()
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, file)
    config, source = _read(f"timm/test_resnet:{file}")
    assert (source.num_classes, config.teacher_size) == (3, "160")
    assert source.mean_std == ((127.5,) * 3, (127.5,) * 3)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(source.build()(x), network(x))


def test_published_weights_are_had_once_and_their_size_is_the_librarys(monkeypatch):
    made = []

    def download(library, name, weights, _option):
        made.append((library, name, weights))
        return timm.create_model(name, num_classes=1000).state_dict()

    monkeypatch.setattr("rsnet.models.pretrained._download", download)
    config, source = _read("timm/resnet10t.c3_in1k", teacher_size="96")
    assert made == [("timm", "resnet10t", "c3_in1k")]
    assert (source.num_classes, source.sizes, config.teacher_size) == (1000, (96,), "96")
    assert source.network.size == 176


def _without_network(*_args, **_more):
    raise OSError("Name or service not known")


@pytest.mark.parametrize(
    ("teacher", "size", "error", "message"),
    [
        ("timm/resnet10t", None, DataError, "--teacher default: cannot get timm's weights of resnet10t"),
        ("resnet181", None, UsageError, "--teacher resnet181: there is no such run, checkpoint or release, "
         "nor a network of torchvision of that name; did you mean resnet18"),
        ("RESNET50", None, UsageError, "--teacher RESNET50: there is no such run, checkpoint or release, "
         "nor a network of torchvision of that name; did you mean resnet50"),
        ("./none.pt", None, UsageError, "--teacher ./none.pt: there is no run, checkpoint or release"),
        ("{wide}", "64", UsageError, "--teacher-size 64: it has 12 10"),
        ("resnet18:{wide}/checkpoints/best.pt", None, UsageError, "best.pt: it holds an RS-Net; give "),
        ("resnet18:none.pth", None, UsageError, "--teacher: there is no file none.pth"),
        ("resnet18.V3", None, UsageError, "--teacher V3: torchvision's resnet18 has IMAGENET1K_V1"),
        (None, "64", UsageError, "--teacher-size: there is no teacher; give one by --teacher"),
    ],
)  # fmt: skip
def test_what_cannot_teach_is_one_line(wide, monkeypatch, teacher, size, error, message):
    monkeypatch.setattr("timm.create_model", _without_network)
    given = _config(teacher=teacher and teacher.format(wide=wide), teacher_size=size)
    with pytest.raises(error, match=re.escape(message)) as raised:
        read_teacher(given, {}, print)
    assert "\n" not in str(raised.value)


def test_a_recorded_command_that_says_none_has_no_teacher():
    given = _config(teacher="none", teacher_weight=1.0, teacher_temperature=1.0)
    assert read_teacher(given, {}, print) == (given, None)
    assert read_teacher(given, {"teacher": "timm/none"}, print) == (given, None)
    evaluation = _config(teacher="timm/none", evaluate=True, resume="auto")
    assert read_teacher(evaluation, {}, print) == (evaluation, None)


def test_weights_that_are_not_finite_do_not_teach(wide, tmp_path):
    found = io.load(wide / "checkpoints" / "best.pt")
    weights = dict(found.model)
    weights["network.conv1.weight"] = torch.full_like(weights["network.conv1.weight"], torch.nan)
    io.save(tmp_path / "best.pt", Checkpoint(found.network, weights))
    with pytest.raises(
        DataError, match=r"--teacher .*best.pt: network.conv1.weight has numbers that"
    ):
        _read(tmp_path / "best.pt")


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes_exactly_and_with_no_other(wide, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    words = [
        "--epochs", "2", "--mixup", "0.2", "--teacher", str(wide), "--teacher-temperature", "2",
        "--checkpoint-every", "3", "--keep", "5", "--log-interval", "2",
    ]  # fmt: skip
    train(whole, *words)
    noted = json.loads((whole / "config.json").read_text())
    assert re.fullmatch(re.escape(str(wide)) + "@sha256:[0-9a-f]{16}", noted["teacher"])
    assert (noted["teacher_size"], noted["teacher_weight"]) == (str(OWN), 1.0)
    out = capsys.readouterr().out
    assert "teacher       at 12: GMACs " in out
    assert "teacher" not in "".join(faults.saved(whole)["model"])
    # From the sixth update of the first epoch.
    shutil.copytree(whole, part)
    for age, suffix in itertools.product(range(1, 5), (".pt", ".pt.sha256")):
        older = part / "checkpoints" / f"last-{age}{suffix}"
        older.rename(older.with_name(f"last{suffix}"))
    assert faults.saved(part)["done"] == 6
    train(part, *words)
    faults.assert_same_end(part, whole)
    lines = [line for line in faults.metrics(part) if "train/total" in line]
    assert all(line["train/kd/teacher"] > 0 for line in lines)
    # Another one is another option; without --teacher, the run's goes on.
    capsys.readouterr()
    train(part, *words, "--teacher", str(wide / "checkpoints" / "best.pt"), code=2)
    assert "already holds a run with other options (--teacher " in capsys.readouterr().err
    train(part, "--epochs", "3", "--resume", "auto")
    assert f"--teacher: run {wide}: " in capsys.readouterr().out
    assert faults.saved(part)["config"]["teacher"] == noted["teacher"]


def test_a_teacher_of_other_classes_is_one_line(tmp_path, capsys):
    other = write_run(tmp_path / "other", WIDE | {"classes": ["ant", "bee", "cat"]})
    train(tmp_path / "run", "--teacher", str(other), code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "has other classes than --data: 0, 1, 2, ant, bee and 1 more" in line


@pytest.mark.faults
@pytest.mark.slow
def test_two_processes_are_taught_as_one_with_both_batches(photos, tmp_path):
    """The first one reads the teacher, both compute it, each for its own images."""
    names = {"classes": ["cat", "ant", "bee"], "sizes": [40, 20]}
    teacher = write_run(tmp_path / "teacher", NETWORK | names | {"stem": "small"})
    found = []
    for name, ranks, more in (("one", 1, ["--accumulate", "2"]), ("two", 2, [])):
        words = faults.command(
            photos, tmp_path / name, "-b", "2", *more, "--epochs", "1", "--mixup", "0"
        )
        words += ["--teacher", str(teacher), "--teacher-size", "ensemble"]
        faults.finish(words if ranks == 1 else faults.torchrun(2, words))
        found.append([m for m in faults.metrics(tmp_path / name) if "train/kd/teacher" in m])
    one, two = found
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["train/kd/teacher"] == pytest.approx(b["train/kd/teacher"], rel=1e-4)
    weights = [faults.saved(tmp_path / n)["model"]["network.fc.weight"] for n in ("one", "two")]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)
