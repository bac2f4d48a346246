"""Fixtures of the routing tests."""

from __future__ import annotations

import pytest

from tests import interpreted


@pytest.fixture
def tiles_of():
    """tiles_of(rows): interpreted.wide_tiles, the last call of which counts."""
    with pytest.MonkeyPatch.context() as patch:
        def tiles_of(rows):
            patch.undo()
            interpreted.wide_tiles(patch, rows)

        yield tiles_of
