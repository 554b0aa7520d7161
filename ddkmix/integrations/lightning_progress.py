"""Lightning's count of batches in a checkpoint, made to begin at a whole optimizer step.

A checkpoint holds parameters after whole steps. Saved in the middle of one (by an exception, or a validation
between two micro-batches), its counters are ahead: the gradients of those micro-batches are gone, and
Lightning would make the next step of what is left of them. The counters are set to those that ModelCheckpoint
saves right after the step's last micro-batch.
"""

from typing import Any

_EVENTS = ("ready", "started", "processed", "completed")


def begin_at_a_step(checkpoint: dict[str, Any], *, was: int, now: int) -> None:
    """Set the counters of a checkpoint to its whole optimizer steps, in place.

    Args:
        checkpoint: as Lightning reads it, before its loops do.
        was: micro-batches of a step in the run that saved it.
        now: micro-batches of a step from here on.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress, done = loops["epoch_loop.batch_progress"], checkpoint["global_step"]
    total, current = progress["total"], progress["current"]
    lag = total["ready"] - total["completed"]  # 1 inside on_train_batch_end, 0 between two batches
    whole = total["ready"] == total["started"] == total["processed"] == done * was and lag in (0, 1)
    if whole and was == now:
        return
    epoch = done - (total["ready"] - current["ready"]) // was  # steps of the present epoch
    if not whole:
        progress["is_last_batch"] = False
        lag = min(1, epoch)
    for counts, steps in ((total, done), (current, epoch)):
        counts.update(dict.fromkeys(_EVENTS, steps * now))
        counts["completed"] -= lag
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = done - lag
