"""Resolution Switchable Networks (Wang et al., ECCV 2020). Knows no data backend.

The names that most programs need are here; they import torch when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsnet.config.model_config import ModelConfig
    from rsnet.inference.classifier import SwitchableClassifier
    from rsnet.models.factory import create_model
    from rsnet.models.switchable import make_switchable
    from rsnet.release.package import load

__version__ = "0.1.0"

__all__ = [
    "ModelConfig",
    "SwitchableClassifier",
    "__version__",
    "create_model",
    "load",
    "make_switchable",
]

_MODULES = {
    "ModelConfig": "rsnet.config.model_config",
    "SwitchableClassifier": "rsnet.inference.classifier",
    "create_model": "rsnet.models.factory",
    "load": "rsnet.release.package",
    "make_switchable": "rsnet.models.switchable",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
