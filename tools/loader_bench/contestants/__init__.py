"""One file per contestant: how its own documentation says to serve packed rows, and nothing else.

A contestant module has

    NAME          its name in tables
    PACKAGE       the package on PyPI whose version is reported
    DOMAINS       "one" or "several": whether it mixes
    HTTP          whether its documentation offers reading over http(s)
    prepare       writes the corpus in its format (not timed)
    open_stream   an endless iterator of batches: dicts with int64 tensors input_ids and labels, (B, T)

Modules are imported one at a time, each in a process of its own.
"""

import importlib
from types import ModuleType

MODULES = {
    "ddkmix": "ddkmix_mixture",
    "webdataset": "webdataset_one",
    "webdataset-randommix": "webdataset_mix",
    "datasets-map": "datasets_map",
    "datasets-stream": "datasets_stream",
    "mosaicml-streaming": "mosaicml",
    "litdata": "litdata_combined",
    "torchdata-nodes": "torchdata_nodes",
}
"""Contestants in the order of the tables; plain webdataset is the one that ratios are taken to."""
BASE = "webdataset"


def load(name: str) -> ModuleType:
    """The module of a contestant."""
    return importlib.import_module(f"loader_bench.contestants.{MODULES[name]}")
