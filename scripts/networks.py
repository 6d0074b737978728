"""Write rsnet/config/networks.json, what `rsnet list` says of torchvision: python scripts/networks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rsnet.config.networks import FILE
from rsnet.models.factory import list_models
from rsnet.models.measured import measure


def table() -> dict[str, dict[str, Any]]:
    """Return the file's content, measured; half a minute."""
    networks = filter(None, map(measure, list_models()))
    return {
        n.name: {"parameters": n.parameters, "gmacs": n.gmacs, "weights": n.weights}
        for n in networks
    }


if __name__ == "__main__":
    rows = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in table().items())
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
