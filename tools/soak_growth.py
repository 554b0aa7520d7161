"""Whether a long run of this process takes more and more memory or files."""

import gc
import os
from collections.abc import Sequence
from pathlib import Path

Sample = tuple[int, int, int]
"""(step, resident bytes, open descriptors)."""

_WARM_UP = 0.25
"""Share of the steps after which neither may grow any more."""
_MORE_MEMORY = 24 * 2**20
_MORE_FILES = 16
_MEDIAN_OF = 5


def sample(step: int) -> Sample:
    """What this process holds now, garbage collected."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return step, pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir()))


def ends(samples: Sequence[Sample], steps: int) -> list[Sample]:
    """A sample of after the warm-up and one of the end, each the median of five."""
    warm = [one for one in samples if one[0] >= _WARM_UP * steps] or list(samples[-1:])
    groups = [group for group in (warm[:_MEDIAN_OF], warm[-_MEDIAN_OF:]) if group]
    return [(group[0][0], _median(group, 1), _median(group, 2)) for group in groups]


def violations(samples: Sequence[Sample], steps: int) -> list[str]:
    """What grew after the warm-up, as sentences."""
    both = ends(samples, steps)
    if len(both) < 2:
        return []
    (_, memory, files), (_, memory_after, files_after) = both
    found = []
    if memory_after - memory > _MORE_MEMORY:
        found.append(f"memory grew from {memory} to {memory_after} bytes after warm-up")
    if files_after - files > _MORE_FILES:
        found.append(f"open descriptors grew from {files} to {files_after} after warm-up")
    return found


def _median(group: Sequence[Sample], column: int) -> int:
    return sorted(one[column] for one in group)[len(group) // 2]
