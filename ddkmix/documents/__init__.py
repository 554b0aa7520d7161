"""Documents straight from where people have them: tars, JSON lines, Parquet, Hugging Face datasets.

Every reader gives all the documents of a shard, in order, or one line that says why it cannot: a shard
that is cut, damaged or joined from two is never read as a shorter one. A document without text (null, an
empty string, a sample that lacks the text member) is given as "", so that whoever drops it can count it.
"""

from ddkmix.documents.energon import read_tar_idx
from ddkmix.documents.files import format_of, read_documents
from ddkmix.documents.hub import (
    HubSplit,
    count_shards,
    hub_fingerprint,
    pin_revision,
    read_hub_documents,
)
from ddkmix.documents.records import PromptFields, TextField
from ddkmix.documents.shard_lists import ListedShard, read_wids
from ddkmix.documents.tar import read_document
from ddkmix.documents.text import digest

__all__ = [
    "HubSplit",
    "ListedShard",
    "PromptFields",
    "TextField",
    "count_shards",
    "digest",
    "format_of",
    "hub_fingerprint",
    "pin_revision",
    "read_document",
    "read_documents",
    "read_hub_documents",
    "read_tar_idx",
    "read_wids",
]
