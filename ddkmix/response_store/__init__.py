"""The response store: what models answered to the prompts of packed rows, kept beside them and read like
them.

    <folder>/<key>/store.json                 what every response depends on, but the rows (`card`)
    <folder>/<key>/<domain>/<shard>-<sha256[:12]>-<prompts[:8]>.responses   one for each row of a shard

The files of shards are those of the logits store (`ddkmix.logits_store.sidecar`); a record is a response's
tokens in the type of the shard's own. A response is found by the content of its shard, the number of its row
and the lengths of the prompts (`prompts`), never by a step. `reader.ResponseStore` reads it.
"""
