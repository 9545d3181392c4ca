"""One tiny model with random weights for all tests of local backends, and both backends over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flowc.backends.llm.local import LocalBackend


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with 512 tokens of context; copied before it is changed."""
    from flowc.backends.llm.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=512)


@pytest.fixture(scope="module", params=["padded", "paged"])
def either(request: pytest.FixtureRequest, folder: Path) -> Iterator[LocalBackend]:
    """The model on each of the local backends."""
    if request.param == "padded":
        from flowc.backends.llm.hf import HFBackend

        backend: LocalBackend = HFBackend(folder, device="cpu", threads=1)
    else:
        from flowc.backends.llm.paged.backend import PagedBackend

        backend = PagedBackend(folder, device="cpu", threads=1)
    yield backend
    backend.close()
