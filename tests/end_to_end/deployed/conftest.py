"""The federation that the modules of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.faulty import Faulty


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """A federation of three hospitals on real processes. It ends with the last test of this folder: eleven
    idle processes take a tenth of a core. A test leaves every process of it running and names its runs as no
    other test does.
    """
    running = Faulty(tmp_path_factory.mktemp("federation"), sites=3)
    with running:
        yield running
    assert running.left_behind == []
