"""What the recipes say, and what the options make of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from pathlib import Path

import pytest

from pipelines.dali import DaliOptions
from pipelines.utils.errors import UsageError
from rsnet.config.command_line import parse
from rsnet.config.recipes import PAPER, Recipe, by_new_names, get_recipe
from rsnet.config.resolve import resolve
from rsnet.config.train_config import TrainConfig, to_plain_dict


@functools.cache
def _parse(line: str):
    return parse(DaliOptions, shlex.split("--data /d " + line))


def _resolve(line: str, previous=None):
    config, _ = _parse(line)
    return resolve(config, world_size=1, device_type="cuda", has_bf16=True, previous=previous)


def test_every_field_of_a_recipe_is_an_option():
    options = {f.name for f in dataclasses.fields(TrainConfig)}
    assert {f.name for f in dataclasses.fields(Recipe)} <= options


def test_the_papers_recipe_is_plain_sgd():
    c = _resolve("")
    assert (c.recipe, c.epochs, c.lr, c.weight_decay, c.lr_decay) == (
        "paper", 120, 0.1, 1e-4, "cosine",
    )  # fmt: skip
    assert (c.warmup, c.label_smoothing, c.decay, c.ema) == (0, 0.0, "all", 0.0)
    assert (c.mixup, c.cutmix, c.auto_augment, c.random_erase, c.ra_reps) == (0, 0, "none", 0, 1)
    assert c.train_sizes == c.sizes
    assert (c.blurpool, c.sizes_per_step) == (False, 5)


@pytest.mark.parametrize("bits", ["--qw 2", "--mode preact --qa 2", "--mode preact --qw 4 --qa 3"])
def test_what_is_quantized_has_the_recipe_of_the_authors_quantized_code(bits):
    c = _resolve(f"{bits} --arch parallel_mobilenetv2" if "preact" not in bits else bits)
    assert (c.epochs, c.lr, c.weight_decay, c.decay) == (120, 0.1, 5e-5, "weights")
    assert (c.lr_decay, c.opt, c.momentum) == ("schedule", "nesterov", 0.9)


@pytest.mark.parametrize(
    ("epochs", "warmup", "lr_decay"),
    [(3, 0, "cosine"), (16, 2, "linear"), (30, 2, "linear"), (88, 5, "cosine"), (120, 5, "cosine")],
)
def test_the_short_recipe_fits_the_epochs(epochs, warmup, lr_decay):
    c = _resolve(f"--recipe short --epochs {epochs}")
    assert (c.epochs, c.warmup, c.lr_decay) == (epochs, warmup, lr_decay)
    assert (c.label_smoothing, c.decay, c.lr) == (0.1, "weights", PAPER.lr)


def test_the_short_average_reaches_back_over_the_same_share_of_any_training():
    """Its memory, 1 / (1 - decay) updates of 1,281,167 / batch an epoch, is 2 epochs of 120 or 2 / 120."""
    for epochs, batch in ((120, 256), (30, 256), (120, 2048), (16, 1024)):
        decay = get_recipe("short", "parallel_resnet50", epochs, batch).ema
        share = 1 / (1 - decay) / (epochs * 1281167 / batch)
        assert share == pytest.approx(1.67e-2, rel=0.02)


@pytest.mark.parametrize(
    "option",
    [
        "--warmup 1", "--label-smoothing 0.2", "--ema 0.5", "--decay all", "--lr-decay step",
        "--epochs 40", "--lr 0.7", "--weight-decay 0.3",
    ],
)  # fmt: skip
def test_each_option_wins_over_the_recipe_and_changes_nothing_else(option):
    name, value = option.removeprefix("--").replace("-", "_").split()
    changed, plain = (_resolve(f"--recipe short --epochs 40 {o}") for o in (option, ""))
    differing = {
        f.name
        for f in dataclasses.fields(plain)
        if getattr(plain, f.name) != getattr(changed, f.name)
    }
    assert differing <= {name}
    assert str(getattr(changed, name)) == value


def test_the_strong_recipe_is_torchvisions_new_one_on_the_papers_optimizer():
    c = _resolve("--recipe strong --batch-size 1024")
    assert (c.epochs, c.lr, c.warmup, c.lr_decay, c.opt) == (600, 0.5, 5, "cosine", "plain")
    assert (c.weight_decay, c.decay, c.label_smoothing) == (2e-5, "weights", 0.1)
    assert (c.mixup, c.cutmix, c.auto_augment, c.flip) == (0.2, 1.0, "trivial", "shared")
    assert (c.random_erase, c.ra_reps, c.train_sizes[0]) == (0.1, 4, 176)
    # 2 epochs of 120, as a share of the training.
    assert 1 / (1 - c.ema) == pytest.approx(600 * 1281167 / 1024 / 60, rel=0.03)


def test_modern_is_a_former_name_of_the_short_recipe(capsys):
    config, _ = parse(DaliOptions, shlex.split("--data /d --recipe modern"))
    assert config.recipe == TrainConfig(data=Path("/d"), recipe="modern").recipe == "short"
    assert capsys.readouterr().err == "note: --recipe modern is now --recipe short\n"
    assert by_new_names({"recipe": "modern", "lr": 1}) == {"recipe": "short", "lr": 1}
    assert by_new_names({"sgd": "nesterov"}) == {"opt": "nesterov"}


def test_a_continued_run_keeps_its_recipe():
    first = dataclasses.asdict(
        _resolve("--recipe short --epochs 16 --mixup 0.2 --sizes-per-step 2")
    )
    again = _resolve("--resume auto", previous=first)
    for name in ("recipe", "epochs", "warmup", "ema", "mixup", "sizes_per_step", "decay"):
        assert getattr(again, name) == first[name], name


def test_a_run_with_all_sizes_a_step_bounds_no_other_sizes():
    first = dataclasses.asdict(_resolve("--sizes 96 64 32"))
    assert _resolve("--resume auto --sizes 96 64", previous=first).sizes_per_step == 2


def test_a_batch_size_that_is_none_in_a_runs_options_is_refused():
    config, _ = _parse("")
    with pytest.raises(UsageError, match="--batch-size"):
        resolve(
            config, world_size=1, device_type="cpu", has_bf16=True,
            previous={"batch_size": -4, "epochs": 2}, previous_global_batch=8,
        )  # fmt: skip


def test_another_recipe_on_resume_is_that_recipe():
    first = dataclasses.asdict(_resolve("--recipe short --epochs 30 --weight-decay 0.3"))
    again = _resolve("--resume auto --recipe paper", previous=first)
    assert (again.ema, again.label_smoothing, again.warmup) == (0.0, 0.0, 0)
    assert (again.decay, again.lr_decay) == ("all", "cosine")
    assert (again.epochs, again.weight_decay) == (30, 0.3)


@pytest.mark.parametrize(
    ("sizes", "scale", "train_sizes"),
    [
        ("224 192 160 128 96", "0.875", (196, 168, 140, 112, 84)),
        ("224 160", "0.7857", (176, 124)),  # torchvision's 176 for 224
        ("32 24 16", "0.875", (28, 20, 12)),
        ("10 7 5", "0.9", (8, 7, 4)),  # never larger
        ("16 6", "0.25", (4, 4)),  # what the smallest resize makes
        ("30 17", "1", (30, 17)),
    ],
)
def test_training_sizes_are_the_nearest_multiples_of_four(sizes, scale, train_sizes):
    assert _resolve(f"--sizes {sizes} --train-size-scale {scale}").train_sizes == train_sizes


@pytest.mark.parametrize(
    ("name", "on", "off"),
    [
        ("auto_augment", "rand", "none"),
        ("clip_grad", 2.0, 0.0),
        ("loss", "bce", "ce"),
        ("mixup", 0.2, 0.0),
        ("ra_magnitude", 7, 9),
        ("ra_reps", 3, 1),
        ("random_erase", 0.1, 0.0),
        ("train_size_scale", 0.5, 1.0),
    ],
)
def test_what_was_switched_on_stays_so_on_resume_and_can_be_switched_off(name, on, off):
    flag = "--" + name.replace("_", "-")
    first = dataclasses.asdict(_resolve(f"{flag} {on}"))
    assert getattr(_resolve("--resume auto", previous=first), name) == on
    assert getattr(_resolve(f"--resume auto {flag} {off}", previous=first), name) == off


def test_another_optimizer_has_a_rate_and_decay_of_its_own():
    """AdamW's are DeiT's (1e-3 for 1024 images an update), LAMB's those of A2 (5e-3 for 2048)."""
    c = _resolve("--opt lamb --batch-size 2048")
    assert (c.lr, c.weight_decay) == (5e-3, 0.02)
    c = _resolve("--opt adamw --batch-size 1024")
    assert (c.opt, c.lr, c.weight_decay, c.momentum) == ("adamw", 1e-3, 0.05, 0.9)
    c = _resolve("--opt adamw --lr 3 --wd 2")
    assert (c.lr, c.weight_decay) == (3, 2)


def test_the_rate_and_decay_of_a_run_go_on_with_its_optimizer_alone():
    previous = {"recipe": "paper", "opt": "plain", "lr": 0.7, "weight_decay": 0.3, "epochs": 9}
    previous |= {"batch_size": 256, "accumulate": 1}

    def ours(line: str, **more: str):
        config, _ = _parse(line)
        c = resolve(
            config, world_size=1, device_type="cuda", has_bf16=True,
            previous=previous | more, previous_global_batch=256,
        )  # fmt: skip
        return c.opt, c.lr, c.weight_decay

    assert ours("") == ("plain", 0.7, 0.3)
    assert ours("--opt nesterov") == ("nesterov", 0.7, 0.3)
    assert ours("--opt adamw") == ("adamw", 2.5e-4, 0.05)
    assert ours("", opt="adamw") == ("adamw", 0.7, 0.3)
    assert ours("--opt plain", opt="adamw") == ("plain", 0.1, 1e-4)
    assert ours("--recipe short", opt="adamw") == ("adamw", 0.7, 0.3)  # no recipe chooses it
    assert ours("--recipe short", opt="nesterov") == ("plain", 0.7, 0.3)


def test_a_run_goes_on_with_its_own_schedule_momentum_and_validation_images():
    first = _resolve(
        "--lr-decay schedule --schedule 10 20 --gamma 0.2 --step 7 --momentum 0.8 --kd-type ens --val-data v"
    )
    previous = json.loads(json.dumps(to_plain_dict(first)))
    c = _resolve("", previous)
    names = ("lr_decay", "schedule", "gamma", "step", "momentum", "kd_type", "val_data")
    assert [getattr(c, name) for name in names] == [getattr(first, name) for name in names]
    c = _resolve("--schedule 5 --momentum 0.5 --kd-type ens_topdown --val-fraction 0.1", previous)
    assert (c.schedule, c.momentum, c.kd_type, c.val_data) == ((5,), 0.5, "ens_topdown", None)
    c = _resolve("", json.loads(json.dumps(to_plain_dict(_resolve("--val-fraction 0.1")))))
    assert c.val_fraction == 0.1
    c = _resolve("--allow-change data --resume auto", json.loads(json.dumps(to_plain_dict(c))))
    assert c.val_fraction is None  # of other data


def test_a_run_that_has_no_checkpoint_yet_goes_on_with_its_network_and_rate():
    first = _resolve(
        "--arch resnet18 --sizes 64 48 --width-mult 0.5 --lr 0.3 --batch-size 32 --num-classes 9"
    )
    config, _ = _parse("")
    c = resolve(
        config, world_size=1, device_type="cuda", has_bf16=True,
        previous=json.loads(json.dumps(to_plain_dict(first))), previous_global_batch=32,
    )  # fmt: skip
    assert (c.arch, c.sizes, c.width_mult, c.lr) == ("parallel_resnet18", (64, 48), 0.5, 0.3)
    assert (c.batch_size, c.num_classes) == (32, 9)


@pytest.fixture
def of_run(tmp_path):
    """Resolve a command line that takes its options from the config.json of a run of these options."""

    def call(given: str, line: str):
        file = (
            tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        )  # as a command line is parsed once
        file.write_text(json.dumps(to_plain_dict(_resolve(given))))
        return _resolve(f"--config {file} {line}")

    return call


def test_what_a_runs_file_has_for_its_sizes_optimizer_and_recipe_does_not_hold_for_others(of_run):
    c = of_run("--sizes 64 48 32", "--sizes 64 32")
    assert (c.sizes, c.sizes_per_step) == ((64, 32), 2)
    assert of_run("--sizes 64 48 32", "--sizes 64 48 40 32").sizes_per_step == 4
    assert of_run("--sizes 64 48 32 --sizes-per-step 2", "--sizes 64 48 40 32").sizes_per_step == 2
    c, own = of_run("--lr 0.7", "--opt adamw"), _resolve("--opt adamw")
    assert (c.opt, c.lr, c.weight_decay) == (own.opt, own.lr, own.weight_decay)
    assert of_run("--lr 0.7", "--opt momentum").lr == 0.7
    c, own = of_run("--epochs 16", "--recipe short"), _resolve("--epochs 16 --recipe short")
    assert (c.warmup, c.ema, c.label_smoothing, c.lr_decay) == (
        own.warmup, own.ema, own.label_smoothing, own.lr_decay,
    )  # fmt: skip
    assert of_run("--mixup 0.2", "--recipe paper").mixup == 0.2
    c, own = of_run("--epochs 16", "--recipe strong"), _resolve("--epochs 16 --recipe strong")
    assert (c.lr, c.weight_decay) == (own.lr, own.weight_decay)
    assert of_run("--opt adamw --lr 0.3", "--recipe strong").lr == 0.3
    assert of_run("--pretrained x.pth", "--evaluate --resume auto").pretrained is None
    assert of_run("--pretrained x.pth", "--no-evaluate").pretrained == "x.pth"


def test_what_a_file_written_by_hand_has_holds_beside_another_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 0.7\nmixup: 0.3\n")
    c = _resolve(f"--config {tmp_path / 'mine.yaml'} --recipe short --opt adamw")
    assert (c.lr, c.mixup) == (0.7, 0.3)
