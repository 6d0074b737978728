"""Options that are read once for each class: tyro takes ten times as long for that as for a line."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pipelines.utils.cores import default_workers


def keep_parsers(patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Let tyro look at a class of options once from now on.

    patch: sets an attribute.
    """
    from tyro._parsers import ParserSpecification

    read: Callable[..., ParserSpecification] = ParserSpecification.from_callable_or_type
    kept: dict[tuple[Any, ...], ParserSpecification] = {}

    def from_callable_or_type(f: Any, **how: Any) -> ParserSpecification:
        if how["intern_prefix"]:  # of a part, within a call for the whole
            return read(f, **how)
        # Defaults are computed with it; these are what they are computed from.
        key = (f, repr(sorted(how.items())), default_workers(), len(os.sched_getaffinity(0)))
        if key not in kept:
            kept[key] = read(f, **how)
        return kept[key]

    patch(ParserSpecification, "from_callable_or_type", staticmethod(from_callable_or_type))
