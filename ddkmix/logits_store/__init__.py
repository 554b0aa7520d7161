"""The logits store: what a teacher says about packed rows, kept beside them and read like them.

    <folder>/<key>/store.json                             what every record depends on, but the rows (`card`)
    <folder>/<key>/<domain>/<shard>-<sha256[:12]>.logits  one record for each row of a shard (`sidecar`)
    <folder>/<key>/head.safetensors                       output weights, only with hidden states (`hidden`)

A record is found by the content of its shard and the number of its row, never by a step: one store serves
every policy, seed, order and number of ranks. `reader.LogitsStore` reads it.
"""
