"""--size-schedule: which sizes an epoch trains, what that costs, and what is refused."""

from __future__ import annotations

import pytest

from pipelines.synthetic import SyntheticOptions
from pipelines.utils.errors import UsageError
from rsnet.config.command_line import as_command, parse
from rsnet.config.resolve import ResolvedConfig, resolve
from rsnet.config.size_schedule import Phase, mean_cost, sizes_in, step_sets
from rsnet.training.objective import SizeSampler

SIZES = "--sizes 32 24 16 --epochs 6 "


def _resolve(words: str, **more) -> ResolvedConfig:
    config, _ = parse(SyntheticOptions, ["--data", ".", *(SIZES + words).split()])
    return resolve(config, world_size=1, device_type="cpu", has_bf16=False, **more)


def test_a_schedule_says_the_sizes_of_each_epoch_and_how_it_is_typed():
    config = _resolve("--size-schedule 0:16 2:16,24 5:16,24,32")
    assert [sizes_in(config.phases, epoch) for epoch in range(6)] == [
        (16,), (16,), (24, 16), (24, 16), (24, 16), (32, 24, 16),
    ]  # fmt: skip
    assert config.size_schedule == ("0:16", "2:24,16", "5:all")  # in one spelling
    assert "--size-schedule 0:16 2:24,16 5:all" in as_command("train", config, SyntheticOptions())
    assert not config.has_all_sizes
    assert _resolve("").phases == (Phase(0, (32, 24, 16)),)
    assert _resolve("--size-schedule 0:all 3:32,16,24").has_all_sizes


def test_a_run_that_goes_on_keeps_its_schedule_unless_another_is_given():
    previous = {"size_schedule": ["0:16", "3:all"], "epochs": 6, "recipe": "paper"}
    assert _resolve("", previous=previous).size_schedule == ("0:16", "3:all")
    assert _resolve("--size-schedule 0:all", previous=previous).has_all_sizes
    assert _resolve("", previous={"epochs": 6}).has_all_sizes  # of an older version
    other = previous | {
        "sizes": [64, 48]
    }  # what is wrong is said of the sizes, not of the schedule
    assert _resolve("", previous=other).has_all_sizes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("16 3:all", "--size-schedule 16 3:all: give EPOCHS:SIZE[,SIZE...] of each part, "),
        ("0:16, 3:all", "give EPOCHS:SIZE"),
        ("0: 3:all", "give EPOCHS:SIZE"),
        ("0:16 -3:all", "-3:all"),
        ("0:16 3.5:all", "give EPOCHS:SIZE"),
        ("1:16 3:all", "say what is trained from the start, as in 0:16 1:16"),
        ("16:0 3:all", "16 is a size; give epochs first, as in 0:16"),
        ("0:16 3:24 3:all", "each part must begin after more epochs than the one before"),
        ("0:16 4:24 3:all", "each part must begin after more epochs than the one before"),
        ("0:1 3:all", "1 is none of --sizes 32 24 16"),
        ("0:16 3:24", "ends without 32 16; train all sizes in the last epochs, as in 4:all"),
        ("0:16 6:all", "--epochs 6 end before the last part, which is to train all sizes"),
        ("0:16 3:all --fixed-qa --qa 2 --mode preact", "--fixed-qa: levels follow the largest"),
        ("0:16 3:all --cuda-graphs", "has all sizes in it, not --size-schedule 0:16 3:all"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_one_line(words, message):
    with pytest.raises(UsageError) as error:
        _resolve(f"--size-schedule {words}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["abc"], []])
def test_a_schedule_that_is_none_in_a_runs_options_is_one_line(words):
    with pytest.raises(UsageError, match=r"--size-schedule .*: is none; give another"):
        _resolve("", previous={"size_schedule": words, "epochs": 6})


def test_the_sets_of_sizes_that_steps_train_are_those_that_are_drawn():
    phases = _resolve("--size-schedule 0:16 2:24,16 5:all").phases
    assert step_sets(phases, 3) == 3
    sampler = SizeSampler({phase.start: phase.sizes for phase in phases}, 2, seed=0)
    drawn = {tuple(sorted(sampler.at(step))) for step in range(100)}
    assert step_sets(phases, 2) == len(drawn) == 4


def test_the_cost_of_a_schedule_is_the_mean_of_its_steps():
    costs = {32: 16.0, 24: 9.0, 16: 4.0}
    phases = (Phase(0, (16,)), Phase(2, (24, 16)), Phase(5, (32, 24, 16)))
    assert mean_cost(costs, phases, 3, 6) == pytest.approx((2 * 4 + 3 * (9 + 4) + 29) / 6)
    # Two sizes a step: the largest, and in half of the steps each of the others.
    assert mean_cost(costs, phases, 2, 6) == pytest.approx((2 * 4 + 3 * 13 + 16 + 6.5) / 6)
