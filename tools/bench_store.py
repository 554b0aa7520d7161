"""The logits store, measured on the real teacher and the real domains in one run. Results: BENCHMARKS.md.

bytes       of a record, per predicted token, for each way of keeping. Goals: at most 3.1 per kept class
            plus 8, and at most 40 with draws alone.
truncation  what a student's KL from the teacher is from the store against the true one; and
rounding    the part of it that one-byte log-probabilities cost (against exact ones). Goal: at most 1 %.
capture     predicted tokens per second of everything that capturing does, over those of the bare forward
            pass on the same batches, in turns. Goal: at least 0.95.
read        rows in random order from the store, over the student's training speed. Goal: at least 20 x.
step        forward, backward and AdamW of a student of a third of the teacher's size, with the signal from
            the store over the same online, in turns. Goal: at most 0.5 x.

python tools/bench_store.py                         about 5 minutes on 2 cores
python tools/bench_store.py --rows 2 --steps 2      a try
"""

import argparse
import json
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddkmix.batch import DenseSignal, TruncatedSignal
from ddkmix.capture import Capturing, open_capturing
from ddkmix.config import Capture, Named, load_config
from ddkmix.distillation import DistillationModel
from ddkmix.logits_store.card import kept_of, write_card
from ddkmix.logits_store.codec import RecordFormat, decode, encode
from ddkmix.logits_store.hidden import decode_hidden, encode_hidden, save_head
from ddkmix.logits_store.reader import LogitsStore
from ddkmix.logits_store.sidecar import SidecarWriter
from ddkmix.logits_store.signal import columns_of, signal_of
from ddkmix.losses import ForwardKL, build_terms
from ddkmix.losses.reference import dense_logits
from ddkmix.models import build_student, head_of, hidden_states
from ddkmix.options import quiet_libraries
from ddkmix.recording import Recorder, head_of_teacher
from ddkmix.rows import RowReader
from ddkmix.teacher import LiveTeacher, label_nats
from ddkmix.teaching import open_teachers
from ddkmix.truncation import seeded_uniforms, truncate_said

FORMATS = {
    "top-0.95-50, 1 byte": Capture(),
    "top-0.95-50, 2 bytes": Capture(log_prob_bytes=2),
    "top-50, 1 byte": Capture(keep="top_k"),
    "12 draws": Capture(keep="drawn"),
    "top-4 + 8 draws": Capture(keep="top_k_drawn", k=4, draws=8),
    "hidden, 2 bytes": Capture(keep="hidden"),
    "hidden, 1 byte": Capture(keep="hidden", hidden_bytes=1),
}
PUBLISHED = "top-0.95-50, 1 byte"
LAYERS = (0, 1, 8, 15, 29)
"""46 of the teacher's 135 million parameters, a third: the embeddings alone are 28."""
TEMPERATURE = 2.0


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/pd_quickstart.yaml"))
    parser.add_argument("--rows", type=int, default=32, help="rows of each domain")
    parser.add_argument("--steps", type=int, default=10, help="counted pairs of steps")
    parser.add_argument("overrides", nargs="*", default=["domains=[domains]"], help="key=value")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = Path(tempfile.mkdtemp(prefix="bench-store-"))
    try:
        config = load_config(
            arguments.config, [*arguments.overrides, f"capture.folder={folder}", "signal.source=live"]
        )
        print(json.dumps(measure(open_capturing(config), arguments.rows, arguments.steps), indent=1))
    finally:
        shutil.rmtree(folder)


def measure(job: Capturing, rows: int, steps: int) -> dict[str, Any]:
    """All of it, on the first rows of each domain's first shard."""
    teacher = open_teachers(job.prepared, job.device)["teacher"]
    assert isinstance(teacher, LiveTeacher)
    config = job.prepared.config
    student = build_student(
        config.student.model_copy(update={"layers": LAYERS}), config.teacher, seed=config.seed
    )
    speed = measure_capture(job, teacher, rows)
    found = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "teacher": config.teacher.model,
        "rows": rows * len(job.rows),
        "capture": speed,
        "formats": measure_formats(job, teacher, student, max(rows // 4, 1)),
    }
    online_s, store_s, tokens, read_s = measure_steps(job, teacher, student, rows, steps)
    found["step"] = {
        "online_s": online_s,
        "store_s": store_s,
        "ratio (goal <= 0.5)": store_s / online_s,
        "read_tokens_per_s": tokens / read_s,
        "student_tokens_per_s": tokens / store_s,
        "read over student (goal >= 20)": store_s / read_s,
    }
    return found


def batches(job: Capturing, rows: int) -> Iterator[tuple[str, RowReader, np.ndarray]]:
    """The first rows of each domain, in batches of the capture."""
    size = job.prepared.config.capture.batch_rows
    for name, packed in job.rows.items():
        reader = RowReader(packed)
        for start in range(0, min(rows, packed.shards[0].num_rows), size):
            yield name, reader, np.arange(start, min(start + size, rows, packed.shards[0].num_rows))


def recorder_of(job: Capturing, name: str, teacher: LiveTeacher) -> Recorder:
    """What a capture of a domain's first shard uses."""
    return job.recorder(next(one for one in job.jobs() if one.domain == name), teacher)


def measure_capture(job: Capturing, teacher: LiveTeacher, rows: int) -> dict[str, float]:
    """The whole capture of a batch (reading, forward, truncation, records, file) and the bare forward pass
    with its logits, in turns; a first batch, which warms up, is measured once more."""
    whole_s, bare_s, tokens = [], [], 0
    writer = SidecarWriter(job.prepared.config.capture.folder / "bench.logits")  # type: ignore[operator]
    work = list(batches(job, rows))
    for name, reader, numbers in work[:1] + work:
        recorder = recorder_of(job, name, teacher)
        ids = torch.stack([torch.from_numpy(reader.read(0, row).astype(np.int64)) for row in numbers])

        def bare(ids: Tensor = ids) -> None:
            with torch.no_grad():
                _ = teacher.model(input_ids=ids, use_cache=False).logits

        def whole(
            recorder: Recorder = recorder, reader: RowReader = reader, numbers: np.ndarray = numbers
        ) -> None:
            for record in recorder.batch(reader, numbers):
                writer.append(record)

        bare_s.append(timed(bare))
        whole_s.append(timed(whole))
        tokens += ids.numel() if len(bare_s) > 1 else 0
    writer.close()
    ratio = statistics.median(b / w for b, w in zip(bare_s[1:], whole_s[1:], strict=True))
    return {
        "forward_tokens_per_s": tokens / sum(bare_s[1:]),
        "capture_tokens_per_s": tokens / sum(whole_s[1:]),
        "capture over forward (goal >= 0.95)": ratio,
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_formats(
    job: Capturing, teacher: LiveTeacher, student: torch.nn.Module, rows: int
) -> dict[str, Any]:
    """Bytes, and the KL that a student has from the teacher, from each format and from all classes."""
    sums: dict[str, dict[str, float]] = {name: {} for name in FORMATS}
    head = head_of(student, job.prepared.vocab_size, check=False)
    for name, reader, numbers in batches(job, rows):
        recorder = recorder_of(job, name, teacher)
        for row in numbers:
            said, labels = recorder.said(reader, np.array([row]))
            assert isinstance(said, DenseSignal)
            ids = torch.from_numpy(reader.read(0, int(row)).astype(np.int64))[None]
            with torch.no_grad():
                hidden = hidden_states(student, ids)[0, : len(labels)]
                logits = dense_logits(DenseSignal(hidden=hidden, head=head))
            true = divergences(logits, dense_logits(said), labels, "true")
            for key, capture in FORMATS.items():
                add(sums[key], true)
                add(sums[key], one_row(capture, said, labels, logits, [name, int(row)]))
    return {key: summary(key, values) for key, values in sums.items()}


def one_row(
    capture: Capture, said: DenseSignal, labels: Tensor, student: Tensor, content: list[Any]
) -> dict[str, float]:
    """Sums over the tokens of a row: bytes, classes, and KL at two temperatures from records, and from exact
    log-probabilities of the same classes."""
    kept = kept_of(capture)
    n, classes = student.shape
    found = {"tokens": float(n)}
    exact: Tensor | TruncatedSignal
    stored: Tensor | TruncatedSignal
    if kept.hidden_bytes is not None:
        nats = label_nats(said, labels, chunk_tokens=256).numpy()
        data = encode_hidden(said.hidden, nats, kept.hidden_bytes)
        hidden, _ = decode_hidden(data, n, said.hidden.shape[1], kept.hidden_bytes, said.hidden.dtype)
        exact, stored = dense_logits(said), dense_logits(replace(said, hidden=hidden))
    else:
        layout = RecordFormat(num_classes=classes, kept=kept, temperatures=(TEMPERATURE,))
        uniforms = torch.from_numpy(seeded_uniforms(content, n, kept.draws)) if kept.draws else None
        exact = truncate_said(said, labels, kept, (TEMPERATURE,), uniforms=uniforms)
        data = encode(columns_of(exact), layout)
        columns = decode(data, n, layout)
        found["entries"] = float(len(columns.ids))
        found["kept"] = float((1.0 - columns.outside).sum())
        stored = signal_of([columns], n, kept.draws or 0).at(0)
    found["bytes"] = float(len(data))
    return {
        **found,
        **divergences(student, exact, labels, "exact"),
        **divergences(student, stored, labels, "stored"),
    }


def divergences(
    student: Tensor, teacher: Tensor | TruncatedSignal, labels: Tensor, name: str
) -> dict[str, float]:
    """The KL from teacher to student, summed over tokens, at both temperatures."""
    found = {}
    for temperature in (1.0, TEMPERATURE):
        loss = ForwardKL(temperature=temperature, scale_by_temperature=False)
        found[f"{name} {temperature}"] = float(loss(student, teacher, labels).sum())
    return found


def add(sums: dict[str, float], more: dict[str, float]) -> None:
    """Sum up."""
    for key, value in more.items():
        sums[key] = sums.get(key, 0.0) + value


def summary(name: str, sums: dict[str, float]) -> dict[str, float]:
    """Means over tokens, and errors as shares of the true KL."""
    n = sums["tokens"]
    found = {"bytes_per_token": sums["bytes"] / n}
    if "entries" in sums:
        found["entries_per_token"] = sums["entries"] / n
        found["kept_mass"] = sums["kept"] / n
        if "draws" not in name:
            found["allowed: 3.1 x entries + 8"] = 3.1 * sums["entries"] / n + 8
    for temperature in (1.0, TEMPERATURE):
        true, exact, stored = (sums[f"{what} {temperature}"] for what in ("true", "exact", "stored"))
        found[f"kl at temperature {temperature:g}, nats"] = true / n
        found[f"truncation at {temperature:g}, share of kl"] = (exact - true) / true
        found[f"rounding at {temperature:g}, share of kl (goal <= 0.01)"] = abs(stored - exact) / true
    return found


def measure_steps(
    job: Capturing, teacher: LiveTeacher, student: torch.nn.Module, rows: int, steps: int
) -> tuple[float, float, int, float]:
    """Seconds of a step online and from the store (medians, in turns), tokens of a step, seconds to read."""
    store = write_store(job, teacher, rows)
    model = DistillationModel(student, vocab_size=job.prepared.vocab_size)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    terms = build_terms(
        [
            Named.model_validate({"name": "cross_entropy", "weight": 0.1}),
            Named.model_validate({"name": "forward_kl", "weight": 0.9, "temperature": TEMPERATURE}),
        ]
    )
    size = job.prepared.config.trainer.batch_rows
    places = [(name, 0, row) for name, packed in job.rows.items() for row in range(rows)]
    random.Random(0).shuffle(places)  # noqa: S311
    online_s, store_s, read_s = [], [], []
    for step in range(steps + 1):  # the first is not counted
        chosen = [places[i % len(places)] for i in range(step * size, (step + 1) * size)]
        ids = torch.stack(
            [
                torch.from_numpy(RowReader(job.rows[name]).read(0, row).astype(np.int64))
                for name, _, row in chosen
            ]
        )

        def train(signal: Callable[[], Any], ids: Tensor = ids) -> None:
            said = signal()
            with torch.autocast("cpu", torch.bfloat16):
                objective, _ = model(ids, ids, 1.0 / ids.numel(), terms, said)
            objective.backward()
            optimizer.step()
            optimizer.zero_grad()

        def online(ids: Tensor = ids) -> Any:
            return teacher.signal({"input_ids": ids})

        def stored(chosen: list[Any] = chosen) -> Any:
            return store.read(chosen)

        online_s.append(timed(lambda train=train, online=online: train(online)))  # type: ignore[misc]
        store_s.append(timed(lambda train=train, stored=stored: train(stored)))  # type: ignore[misc]
        read_s.append(timed(stored))
    medians = [statistics.median(times[1:]) for times in (online_s, store_s, read_s)]
    return medians[0], medians[1], size * ids.shape[1], medians[2]


def write_store(job: Capturing, teacher: LiveTeacher, rows: int) -> LogitsStore:
    """A store of whole shards whose first rows are captured, and the others empty."""
    folders = {}
    for one in {one.domain: one for one in reversed(job.jobs())}.values():
        recorder = job.recorder(one, teacher)
        folders[one.domain] = job.folder(one.domain)
        head = head_of_teacher(teacher, job.prepared.vocab_size)
        write_card(
            folders[one.domain], job.cards[one.domain], num_classes=len(head.weight[: head.vocab_size])
        )
        if job.cards[one.domain].kept.is_hidden:
            save_head(folders[one.domain], head)
        with SidecarWriter(one.path) as writer:
            for row, record in recorder.records(0):
                if row >= rows:
                    break
                writer.append(record)
            for _ in range(writer.num_rows, one.num_rows):
                writer.append(b"")
            writer.finish({"shard": job.rows[one.domain].shards[0].sha256})
    return LogitsStore(folders, job.rows)


if __name__ == "__main__":
    main()
