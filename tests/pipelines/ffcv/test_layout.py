"""FFCV's format without FFCV: the layout is that of its own types, and the package is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.ffcv import layout
from tests.conftest import needs_ffcv
from tests.helpers.betons import import_ffcv

# In a fresh interpreter; importing FFCV would also set PyTorch's threads to one.
CODE = """
import sys, torch
torch.set_num_threads(2)
import pipelines.ffcv.convert, pipelines.ffcv.loader, pipelines.ffcv.sidecar, pipelines.ffcv.verify
assert not {"ffcv", "cv2"} & set(sys.modules)
assert torch.get_num_threads() == 2
"""


@needs_ffcv
def test_the_layout_is_ffcvs():
    import_ffcv()
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert types.HeaderType == layout.HEADER
    assert types.ALLOC_TABLE_TYPE == layout.ALLOCATION
    assert types.FieldDescType == layout.DESCRIPTOR
    assert types.CURRENT_VERSION == layout.VERSION
    kinds = {number: kind.__name__ for number, kind in types.TYPE_ID_HANDLER.items() if kind}
    assert kinds == dict(enumerate(layout.KINDS))
    assert (IMAGE_MODES["jpg"], IMAGE_MODES["raw"]) == (layout.JPG, layout.RAW)
    fields = {"image": RGBImageField(), "label": IntField()}
    for names in (["image", "label"], ["label", "image"]):
        expected = types.get_metadata_type([fields[name] for name in names])
        assert layout.row_type(names) == expected


@needs_ffcv
@pytest.mark.slow  # a fresh interpreter
def test_reading_converting_and_verifying_import_no_ffcv():
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", CODE], cwd=root, check=True)
