from __future__ import annotations

import pytest

from views import runs


@pytest.fixture(scope="session")
def grey_run(tmp_path_factory):
    return runs.analyse_grey(tmp_path_factory.mktemp("grey") / "run")


@pytest.fixture(scope="session")
def rgb_run(tmp_path_factory):
    return runs.analyse_rgb(tmp_path_factory.mktemp("rgb") / "run")
