"""The guest's model, which is made once."""

from __future__ import annotations

import pytest

from nemo_srl.models import families
from tests.extending.guest import Guest, make_guest


@pytest.fixture(scope="package")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    return make_guest(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest's family is known to this process while the test runs."""
    monkeypatch.setattr(families, "_registered", {})
    families.register("house_guest.family")
