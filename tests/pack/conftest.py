"""Fixtures of the tests of packing."""

from pathlib import Path

import pytest

from ddkmix.config import Storage
from ddkmix.tokenizer import TokenizerCard, read_tokenizer
from tests.storage.conftest import _no_connection_left, plain_web, s3, s3_endpoint, web

__all__ = ["_no_connection_left", "plain_web", "s3", "s3_endpoint", "web"]  # the servers of the storage tests


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TokenizerCard:
    """The small byte-level BPE tokenizer; its separator has id 0."""
    return read_tokenizer(str(tokenizer_folder))


@pytest.fixture
def storage() -> Storage:
    """One attempt, and little patience."""
    return Storage(attempts=1, timeout_s=5.0)
