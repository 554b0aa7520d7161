"""Where the documents of a row begin, told from its tokens alone.

A document's segment begins at the separator before it:

    row        a a a <sep> b b <sep> c c c <sep> <sep>
    position   0 1 2   0   1 2   0   1 2 3   0     0

So the separator is still predicted from the document that it ends, and is itself the context from which
the next one begins: every token keeps a proper context, and none has to be masked. The first segment of a
row begins with the row. Padding is separators, each a segment of one token. All this needs a separator
that no text contains (`tokenizer.check_separator`).

The trainer does the same with tensors (`boundaries.document_positions`); this one is for loops of your own:
causal models of transformers keep documents apart when they get these as `position_ids` and no mask.
"""

import numpy as np
from jaxtyping import Int, Integer


def document_positions(input_ids: Integer[np.ndarray, "B T"], separator_id: int) -> Int[np.ndarray, "B T"]:
    """The position of each token in its document's segment, counted from 0."""
    index = np.arange(input_ids.shape[1])
    begins = (input_ids == separator_id) | (index == 0)
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
