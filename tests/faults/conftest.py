"""What tests of faults share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from remote_client import Client


@pytest.fixture
def client() -> Iterator[Any]:
    made: list[Client] = []

    def make(url: str, **settings: Any) -> Client:
        made.append(Client(url, **settings))
        return made[-1]

    yield make
    for each in made:
        each.store.close(2.0)
