"""Options: parsing, rules, and what is left unset."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_origin

import pytest

from pipelines.dali import DaliOptions
from pipelines.utils.errors import UsageError
from rsnet.config.command_line import as_command, parse
from rsnet.config.model_config import ModelConfig
from rsnet.config.resolve import ResolvedConfig, resolve
from rsnet.config.train_config import TOPICS, TrainConfig, to_plain_dict


@functools.cache
def _parse(line: str):
    return parse(DaliOptions, shlex.split("--data /d " + line))


def _resolve(line: str = "", trained=None, world_size=1, device="cuda"):
    config, _ = _parse(line)
    return resolve(
        config, world_size=world_size, device_type=device, has_bf16=True, trained=trained
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--sizes", "--sizes: give one or more sizes"),
        ("--sizes 0", "--sizes 0: give one or more sizes"),
        (
            "--sizes 64 32 64",
            "--sizes 64 32 64: give one or more sizes, positive and all different",
        ),
        ("--sizes big", "--sizes"),
        ("--epochs 0", "--epochs 0: at least 1"),
        ("--lr nan", "--lr nan: must be a positive number"),
        ("--lr 0", "--lr 0.0: must be a positive number"),
        ("--lr abc", "--lr"),
        ("--wd -1", "--weight-decay -1.0"),
        ("--momentum 1", "--momentum 1.0"),
        ("-b 0", "--batch-size 0"),
        ("--accumulate 0", "--accumulate 0"),
        ("--label-smoothing 1", "--label-smoothing 1.0"),
        ("--clip-grad inf", "--clip-grad inf"),
        ("--bce-target-thresh 1", "--bce-target-thresh 1.0: must be at least 0 and less than 1"),
        ("--seed -1", "--seed -1"),
        ("--seed 9999999999999999999", "--seed 9999999999999999999"),
        ("--batch 3", "--batch: there is no such option; did you mean --batch-size?"),
        ("--num-classes 1", "--num-classes 1"),
        ("--kd-type both", "invalid choice 'both' for argument '-t/--kd-type'"),
        ("--workers 0", "--workers 0: at least one thread"),
        ("--evaluate", "--evaluate: say which checkpoint"),
        ("--evaluate --resume auto --init-from x.pt", "--evaluate takes --resume"),
        ("--evaluate --profile --resume auto", "--evaluate and --profile: choose one"),
        (
            "--balanced-sampling --class-weights balanced",
            "--balanced-sampling and --class-weights balanced: choose one",
        ),
        ("--balanced-sampling --ra-reps 2", "--balanced-sampling and --ra-reps 2: choose one"),
        ("--auto-augment ra --ra-magnitude 31", "--ra-magnitude 31: must be from 0 to 30"),
        (
            "--aa rand-m7-mstd0.5-inc1",
            "is --auto-augment rand --ra-magnitude 7",
        ),
        (
            "--opt sgd",
            "plain momentum in torchvision, and Nesterov's in timm; give plain or nesterov",
        ),
        ("--train-size-scale 1.1", "--train-size-scale 1.1: must be from 0.25 to 1"),
        ("--ra-reps 0", "--ra-reps 0: at least 1"),
        ("--aug-repeats 101", "--ra-reps 101: at least 1, and 100 at most"),
        ("--random-erase 1.1", "--random-erase 1.1: must be a share from 0 to 1"),
        ("--reprob -0.1", "--random-erase -0.1: must be a share from 0 to 1"),
        ("--compile --recompute norm", "--compile and --recompute: choose one"),
        ("--profile-limit 0", "--profile-limit 0.0: must be a positive number of seconds"),
        ("--bacth-size 3", "--bacth-size: there is no such option; did you mean --batch-size?"),
        ("--worker=3", "--worker: there is no such option; did you mean --workers?"),
        ("--arch=", "--arch: the value is empty"),
        ("--arch ''", "--arch: the value is empty"),
        ("--output ''", "--output: the value is empty"),
        ("--timeout 1e18", "--timeout 1e+18: must be a positive number of seconds, 1e8 at most"),
        ("--checkpoint-every 9999999999", "--checkpoint-every 9999999999: a number of updates"),
        ("--on-nonfinite skip 9999999999", "--on-nonfinite skip 9999999999: stop, or skip"),
        ("--schedule 30 2000000", "--schedule 30 2000000: epochs are positive, and 1000000"),
        ("--zzz", "--zzz: there is no such option; --help lists all options"),
        ("stray", "stray: it belongs to no option"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(line, message):
    with pytest.raises(UsageError) as error:
        _parse(line)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_number_has_an_upper_bound():
    """Except --sizes-per-step, which --sizes bounds, and --clip-grad, of which any will do."""
    unbounded = {"sizes_per_step", "clip_grad"}
    config, options = _parse("")
    for values in (config, options):
        for field in dataclasses.fields(values):
            kind = re.search(r"\b(int|float)\b", str(field.type))
            if field.name in unbounded or kind is None:
                continue
            huge = 10**30 if kind[1] == "int" else 1e30
            given = (huge,) if "tuple" in str(field.type) else huge
            with pytest.raises(UsageError, match=f"--{field.name.replace('_', '-')} "):
                dataclasses.replace(values, **{field.name: given})


def test_missing_data_is_named():
    with pytest.raises(UsageError, match="--data"):
        parse(DaliOptions, [])


def test_the_originals_short_names_work():
    config, options = parse(
        DaliOptions,
        shlex.split(
            "-d /x -a parallel_resnet18 -b 8 --wd 0.1 -t ens -e -c out -p 7 -j 3 --resume x.pt"
        ),
    )
    assert (str(config.data), config.arch, config.batch_size) == ("/x", "parallel_resnet18", 8)
    assert (config.weight_decay, config.kd_type, config.evaluate) == (0.1, "ens", True)
    assert (str(config.output), config.log_interval, options.workers) == ("out", 7, 3)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--opt nesterov", "opt", "nesterov"),
        ("--opt momentum", "opt", "plain"),
        ("--sgd=sgd_nesterov", "opt", "nesterov"),
        ("--sched linear", "lr_decay", "linear"),
        ("--lr-decay cos", "lr_decay", "cosine"),
        ("--sched=cos", "lr_decay", "cosine"),
        ("--auto-augment ta_wide", "auto_augment", "trivial"),
        ("--auto_augment=ra", "auto_augment", "rand"),
        ("--aa randaugment", "auto_augment", "rand"),
        ("--reprob 0.25", "random_erase", 0.25),
        ("--aug-repeats 3", "ra_reps", 3),
        ("--warmup-epochs 3", "warmup", 3),
        ("--smoothing 0.2", "label_smoothing", 0.2),
        ("--model-ema-decay 0.9", "ema", 0.9),
        ("--grad-accum-steps 4", "accumulate", 4),
        ("--clip-grad-norm 2", "clip_grad", 2.0),
        ("--mixup-alpha 0.2", "mixup", 0.2),
        ("--cutmix-alpha 0.3", "cutmix", 0.3),
        ("--initial-checkpoint x.pt", "pretrained", "x.pt"),
        ("--init-from x.pt", "pretrained", "x.pt"),
        ("--keep-checkpoints 5", "keep", 5),
        ("--dist-timeout 60", "timeout", 60.0),
        ("--norm-weight-decay", "decay", "all"),
        ("--no-norm-weight-decay", "decay", "weights"),
        ("--decay weights", "decay", "weights"),
        ("--bce-loss", "loss", "bce"),
        ("--stochastic-depth-prob 0.1", "drop_path", 0.1),
    ],
)
def test_the_names_of_timm_and_torchvision_work(words, name, value):
    given, _ = _parse(words)
    plain, _ = _parse("")
    assert getattr(given, name) == value
    assert dataclasses.replace(given, **{name: getattr(plain, name)}) == plain


def test_the_help_is_grouped_by_topic(capsys):
    with pytest.raises(SystemExit):
        parse(DaliOptions, ["--help"])
    shown = capsys.readouterr().out
    titles = re.findall(r"^([A-Z].*[^.\n])$", shown, re.MULTILINE)
    topics = [(get_origin(topic) or topic).__doc__.rstrip(".") for topic in TOPICS.values()]
    assert titles == [*topics, "Options", "Object storage", "Common options"]
    names = [
        f.name for topic in TOPICS.values() for f in dataclasses.fields(get_origin(topic) or topic)
    ]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("parallel_resnet50", (120, 0.1, 1e-4)),
        ("parallel_resnext50_32x4d", (120, 0.1, 1e-4)),
        ("parallel_mobilenetv2", (150, 0.05, 4e-5)),
    ],
)
def test_what_is_unset_is_the_papers_recipe(arch, expected):
    resolved = _resolve(f"--arch {arch}")
    assert (resolved.epochs, resolved.lr, resolved.weight_decay) == expected
    assert resolved.sizes == (224, 192, 160, 128, 96)
    assert (resolved.kd, resolved.kd_type, resolved.normalize) == (True, "ens_topdown", "imagenet")


def test_the_learning_rate_follows_the_global_batch():
    assert _resolve("-b 64 --accumulate 2", world_size=4).lr == pytest.approx(0.1 * 512 / 256)
    assert _resolve("-b 64 --lr 0.3", world_size=4).lr == 0.3


def test_given_options_win_over_recipe_and_checkpoint():
    trained = ModelConfig("parallel_resnet18", 3, (64, 32), normalize="unit")
    assert _resolve(trained=trained).sizes == (64, 32)
    assert _resolve(trained=trained).arch == "parallel_resnet18"
    assert _resolve(trained=trained).normalize == "unit"
    given = _resolve("--sizes 32 --normalize imagenet --epochs 3 --wd 0", trained)
    assert (given.sizes, given.normalize, given.epochs) == ((32,), "imagenet", 3)
    assert given.weight_decay == 0


def test_a_continued_run_keeps_what_it_was_started_with():
    previous = to_plain_dict(_resolve("--epochs 7 -b 64 --lr 0.3 --wd 0.01 --clip-grad 2"))
    config, _ = _parse("--resume auto")
    again = resolve(
        config, world_size=1, device_type="cuda", has_bf16=True, previous=previous,
        previous_global_batch=64,
    )  # fmt: skip
    assert (again.epochs, again.batch_size, again.lr) == (7, 64, 0.3)
    assert (again.weight_decay, again.clip_grad) == (0.01, 2)
    config, _ = _parse("--resume auto -b 128 --epochs 9")
    again = resolve(
        config, world_size=1, device_type="cuda", has_bf16=True, previous=previous,
        previous_global_batch=64,
    )  # fmt: skip
    assert (again.epochs, again.batch_size) == (9, 128)
    assert again.lr == pytest.approx(0.6)  # the run's own rate, for twice the images


@pytest.mark.parametrize(
    ("words", "back", "name", "kept", "given"),
    [
        ("--no-kd", "--kd", "kd", False, True),
        ("--balanced-sampling", "--no-balanced-sampling", "balanced_sampling", True, False),
        ("--mode preact --qa 2 --fixed-qa", "--no_fixed_qa", "fixed_qa", True, False),
        ("--class-weights balanced", "--class-weights none", "class_weights", "balanced", None),
        ("--on-nonfinite skip 3", "--on-nonfinite stop", "on_nonfinite", ("skip", "3"), ("stop",)),
        ("--keep 6", "--keep 2", "keep", 6, 2),
        ("--norm-lr-mult 5", "--norm-lr-mult 1", "norm_lr_mult", 5.0, 1.0),
        ("--layer-decay 0.7", "--layer-decay 1", "layer_decay", 0.7, 1.0),
        (
            "--loss bce --bce-target-thresh 0.2",
            "--bce-target-thresh 0",
            "bce_target_thresh",
            0.2,
            0.0,
        ),
        ("--teacher-temperature 3", "--teacher-temperature 1", "teacher_temperature", 3.0, 1.0),
        ("--teacher-weight 3", "--teacher-weight 1", "teacher_weight", 3.0, 1.0),
    ],
)
def test_a_continued_run_trains_as_before_unless_it_is_told_otherwise(
    words, back, name, kept, given
):
    assert getattr(_resolve(), name) == given
    previous = json.loads(json.dumps(to_plain_dict(_resolve(words))))
    for more, expected in (("", kept), (back, given)):
        config, _ = _parse(f"--resume auto {more}")
        again = resolve(
            config, world_size=1, device_type="cuda", has_bf16=True, previous=previous,
            previous_global_batch=256,
        )  # fmt: skip
        assert getattr(again, name) == expected


def test_the_environments_names_for_wandb_count_where_none_are_given(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert (_resolve().wandb_project, _resolve().wandb_name) == ("rsnet", None)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "night")
    assert (_resolve().wandb_project, _resolve().wandb_name) == ("theirs", "night")
    given = _resolve("--wandb-project mine --wandb-name day")
    assert (given.wandb_project, given.wandb_name) == ("mine", "day")
    for name in ("WANDB_ENTITY", "WANDB_TAGS"):
        monkeypatch.delenv(name, raising=False)
    assert (_resolve().wandb_entity, _resolve().wandb_tags) == (None, ())
    monkeypatch.setenv("WANDB_ENTITY", "team")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    assert (_resolve().wandb_entity, _resolve().wandb_tags) == ("team", ("a", "b"))
    given = _resolve("--wandb-entity me --wandb-tags c d")
    assert (given.wandb_entity, given.wandb_tags) == ("me", ("c", "d"))


def test_sizes_are_sorted_from_the_largest():
    assert _resolve("--sizes 32 96 64").sizes == (96, 64, 32)


def test_a_cpu_gets_a_batch_that_fits_it():
    assert _resolve(device="cpu").batch_size == 32
    assert _resolve(device="cuda").batch_size == 256


def test_the_resolved_command_gives_the_same_run_again():
    resolved = _resolve("--sizes 64 32 --no-kd --lr 0.3 --output 'a b' -j 7")
    _, options = _parse("-j 7")
    command = shlex.split(as_command("train_dali.py", resolved, options))
    assert command[:2] == ["python", "train_dali.py"]
    again, options_again = parse(DaliOptions, command[2:])
    assert resolve(again, world_size=1, device_type="cuda", has_bf16=True) == resolved
    assert options_again == options


def test_plain_options_hold_only_what_a_safe_load_takes():
    plain = to_plain_dict(_resolve("--sizes 64 32"))
    assert all(isinstance(v, str | int | float | bool | list | None) for v in plain.values())
    assert set(plain) == {f.name for f in dataclasses.fields(TrainConfig)}
    assert {f.name for f in dataclasses.fields(ResolvedConfig)} == set(plain)


def test_the_configuration_needs_no_torch():
    code = "import sys, rsnet.config.train_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("world_size", "batch_size", "accumulate"),
    [(1, 64, 8), (2, 64, 4), (4, 64, 2), (8, 64, 1), (16, 32, 1), (3, 64, 1)],
)
def test_other_processes_share_the_images_of_an_update_as_before(
    world_size, batch_size, accumulate
):
    """Of a run of 8 processes; 3 cannot, which is refused later."""
    previous = to_plain_dict(_resolve("-b 64 --lr 0.3 --seed 5"))
    config, _ = _parse("--resume auto")
    again = resolve(
        config, world_size=world_size, device_type="cuda", has_bf16=True, previous=previous,
        previous_global_batch=512,
    )  # fmt: skip
    assert (again.batch_size, again.accumulate) == (batch_size, accumulate)
    assert again.seed == 5
    assert (again.lr == 0.3) == (world_size != 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bce-target-thresh 0.2", "--bce-target-thresh 0.2: needs --loss bce"),
    ],
)
def test_what_another_loss_does_not_have_is_refused(words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        _resolve(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--checkpoint-every x",
            "--checkpoint-every x: a number of updates, or of minutes as in 10m",
        ),
        ("--checkpoint-every -1", "--checkpoint-every"),
        ("--keep 0", "--keep 0: at least 1"),
        ("--on-nonfinite skip", "--on-nonfinite skip: stop, or skip and a number"),
        ("--on-nonfinite skip 0", "--on-nonfinite skip 0: stop, or skip and a number"),
        ("--timeout 0", "--timeout 0.0: must be a positive number"),
    ],
)
def test_what_a_run_does_in_need_is_checked(words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        _parse(words)


@pytest.mark.parametrize("output", ["s3://bucket/run", "runs/run", Path("runs/run")])
def test_what_a_checkpoint_holds_of_the_options_are_plain_values_alone(output):
    plain = to_plain_dict(TrainConfig(data="s3://bucket/data", output=output))
    assert plain["output"] == str(output)
    assert {type(value) for value in plain.values()} <= {str, int, float, bool, list, type(None)}
