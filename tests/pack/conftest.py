"""Fixtures of the tests of packing."""

from pathlib import Path

import pytest

from ddkmix.tokenizer import TokenizerCard, read_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TokenizerCard:
    """The small byte-level BPE tokenizer; its separator has id 0."""
    return read_tokenizer(str(tokenizer_folder))
