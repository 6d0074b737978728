"""A release and servers of it, for the tests of serving."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rsnet.inference.classifier import SwitchableClassifier
from tests.helpers import releases

ACCURACY = {
    name: {"top1": top1, "top5": 90.0}
    for name, top1 in (("64", 60.0), ("48", 55.0), ("32", 50.0), ("ensemble", 80.0))
}
TABLE = {
    64: {"median": 8.0, "p95": 9.0},
    48: {"median": 4.0, "p95": 5.0},
    32: {"median": 2.0, "p95": 3.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("serve") / "release", ACCURACY)


@pytest.fixture(scope="module")
def loaded(folder) -> SwitchableClassifier:
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    classifier._latencies = TABLE
    return classifier


@pytest.fixture
def classifier(loaded, monkeypatch) -> SwitchableClassifier:
    """A test may replace what it predicts with."""
    monkeypatch.setattr(loaded, "predict", loaded.predict)
    return loaded


@pytest.fixture(scope="module")
def client(loaded):
    from tests.helpers.servers import (
        serving,  # here, as where httpx is missing the folder is collected, too
    )

    with serving(loaded, batch_size=4, max_megabytes=0.1, max_megapixels=1.0) as client:
        yield client


@pytest.fixture
def gate(classifier):
    from tests.helpers.servers import Gate

    classifier.predict = Gate(classifier)
    yield classifier.predict
    classifier.predict.is_open.set()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool
