"""Labelled logits, temperatures and the calibration error, against plain ones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import reference
from pipelines.batch import LoaderSpec
from pipelines.utils.errors import DataError, UsageError
from rsnet.inference import calibration as temperature
from rsnet.inference.calibration import LabelledLogits, collect_logits, find_labelled_images
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.release import package as release
from tests.helpers import releases
from tests.helpers.releases import CLASSES, SIZES


def _labelled(true: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose classes are drawn with these probabilities after division by `true`."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 6, generator=generator)
    labels = torch.multinomial((logits / true).softmax(1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("true", [0.5, 1.0, 4.0])
def test_the_temperature_is_that_of_the_least_cross_entropy(true):
    logits, labels = _labelled(true)

    def nll(t: float) -> float:
        z = logits.double().numpy() / t
        z = z - z.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels.numpy()]))

    found = temperature.fit_temperature(logits, labels)
    assert found == pytest.approx(min(np.arange(0.4, 5.0, 0.03), key=nll), abs=0.03)
    assert found == pytest.approx(true, rel=0.06)


@pytest.mark.parametrize(
    ("sign", "limit"), [(1, 1 / temperature.MAX_TEMPERATURE), (-1, temperature.MAX_TEMPERATURE)]
)
def test_a_network_that_is_always_right_or_wrong_gets_a_finite_temperature(sign, limit):
    logits = sign * 2 * torch.eye(4)
    found = temperature.fit_temperature(logits, torch.arange(4))
    assert math.isfinite(found)
    assert found == pytest.approx(limit, rel=0.05) if sign < 0 else found < 0.3


def test_the_calibration_error_is_that_of_a_loop_over_the_bins():
    logits, labels = _labelled(2.0)
    for t in (1.0, 2.0):
        probabilities = (logits / t).softmax(1).numpy().astype(np.float64)
        best, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
        expected = 0.0
        for i in range(15):
            inside = (best >= i / 15) & (best < (i + 1) / 15)
            if inside.any():
                expected += inside.mean() * abs(right[inside].mean() - best[inside].mean())
        found = temperature.expected_calibration_error(logits, labels, t)
        assert found == pytest.approx(100 * expected, abs=1e-4)


def test_a_network_that_is_certain_and_wrong_is_off_by_100_percent():
    logits = 100 * torch.eye(3)
    assert temperature.expected_calibration_error(logits, torch.tensor([1, 2, 0])) == 100
    assert temperature.expected_calibration_error(logits, torch.tensor([0, 1, 2])) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("calibration") / "release")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return releases.write_photos(tmp_path_factory.mktemp("labelled") / "val")


def test_the_report_is_of_images_that_were_not_fitted_to(folder, data):
    classifier = SwitchableClassifier.load(folder)
    found = collect_logits(classifier, find_labelled_images(data, classifier.config["network"]))
    one, other = found.halves()
    keys = [{tuple(row.tolist()) for row in half.logits[64]} for half in (one, other)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 70
    again = found.halves()[0]
    assert torch.equal(one.labels, again.labels)


def test_the_logits_are_those_of_an_evaluation(folder, data):
    classifier = SwitchableClassifier.load(folder, batch_size=16)
    found = collect_logits(
        classifier, find_labelled_images(data.parent, classifier.config["network"])
    )
    spec = LoaderSpec(data.parent, SIZES, 70, torch.device("cpu"))
    (batch,) = reference.make_loaders(reference.ReferenceOptions(), spec, False).val
    assert torch.equal(found.labels, batch.labels)
    network = release.load(folder)
    for images, size in zip(batch.images, SIZES, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(
                found.logits[size], network(images, size), rtol=1e-4, atol=1e-4
            )


def test_labels_follow_the_releases_classes_by_name(data):
    network = {"classes": CLASSES[::-1], "num_classes": 8}
    folder = find_labelled_images(data, network)
    names = [network["classes"][label] for label in folder.labels]
    assert names == [Path(path).parent.name for path in folder.paths]


def test_without_names_the_folders_are_the_classes_in_their_order_which_is_said(data, capsys):
    folder = find_labelled_images(data, {"classes": [], "num_classes": 7})
    assert [CLASSES[label] for label in folder.labels] == [
        Path(p).parent.name for p in folder.paths
    ]
    assert capsys.readouterr().err == (
        "note: the network does not name its classes: they are taken to be the folders, in the order of "
        "their names\n"
    )
    with pytest.raises(UsageError, match=r"has 7 classes, and the release 8 that it does not name"):
        find_labelled_images(data, {"classes": [], "num_classes": 8})


def test_without_names_folders_that_are_numbers_are_outputs_as_in_an_evaluation(tmp_path, capsys):
    for number in range(11):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "0.jpg").touch()
    folder = find_labelled_images(tmp_path, {"classes": [], "num_classes": 11})
    assert folder.labels.tolist() == [int(Path(path).parent.name) for path in folder.paths]
    assert "the class folders are numbers: outputs of the network" in capsys.readouterr().err


def test_one_image_is_too_few():
    with pytest.raises(UsageError, match="--data: at least 2 images are needed"):
        LabelledLogits(torch.zeros(1), {64: torch.zeros(1, 2)}).halves()


def test_outputs_that_are_not_finite_name_the_image(folder, data, monkeypatch):
    classifier = SwitchableClassifier.load(folder)
    monkeypatch.setattr(
        classifier, "logits", lambda pixels, _: torch.full((len(pixels), 8), torch.nan)
    )
    labelled = find_labelled_images(data, classifier.config["network"])
    with pytest.raises(DataError, match=r"0\.jpg: the network's outputs at size 64 are not finite"):
        collect_logits(classifier, labelled)
