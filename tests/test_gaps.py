"""Gaps of two models as they are, also of models that read differently."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ddkmix.cli import main
from ddkmix.config import parse_config
from ddkmix.errors import ConfigError, ModelError
from ddkmix.gaps import measure_and_tell, measure_gaps
from ddkmix.held_out import select_rows
from ddkmix.models import load_model
from ddkmix.preflight import check
from ddkmix.prepare import pack_rows
from ddkmix.same_text import RowTexts
from ddkmix.tokenizer import read_tokenizer
from ddkmix.types import DomainLosses
from tests.conftest import ConfigTree

Make = Callable[..., ConfigTree]


@pytest.fixture
def tree(tiny_config: Make, tiny_teacher: Path, tmp_path: Path) -> Callable[..., ConfigTree]:
    """A function that gives the config of a student in a folder and another teacher."""

    def make(student: Path, teacher: Path, **sections: Any) -> ConfigTree:
        return tiny_config(
            teacher={"model": str(teacher), "dtype": "float32"},
            student={"init": "load", "layers": None, "model": str(student)},
            cache_dir=str(tmp_path / "cache"),
            **{"evaluation": {"rows": 4}, **sections},
        )

    return make


def literal_bits(folder: Path, rows: list[list[str]], before: list[int]) -> tuple[float, int]:
    """Nats of a model on the text of some rows, one row and one token after the other, and the bytes."""
    model, card = load_model(str(folder)).eval(), read_tokenizer(str(folder))
    encode = Tokenizer.from_file(str(card.path)).encode
    nats = 0.0
    for texts in rows:
        ids, of_text = list(before or [card.separator_id]), []
        for i, text in enumerate(texts):
            ids += [card.separator_id] * (i > 0)
            own = encode(text, add_special_tokens=False).ids
            of_text += range(len(ids), len(ids) + len(own))
            ids += own
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats -= sum(log_p[place - 1, ids[place]].item() for place in of_text)
    return nats, sum(len(text.encode()) for texts in rows for text in texts)


@pytest.mark.parametrize(("kind", "before"), [("other_teacher", []), ("sentence_teacher", [1])])
@pytest.mark.parametrize("swapped", [False, True])
def test_models_that_read_differently_are_compared_on_the_same_bytes(
    tree: Make,
    tiny_teacher: Path,
    request: pytest.FixtureRequest,
    kind: str,
    before: list[int],
    swapped: bool,
) -> None:
    """Bits per byte of both, recomputed token by token from the text of the rows; whichever is the student,
    and whether its tokens are bytes or not."""
    other = request.getfixturevalue(kind)
    student, teacher = (other, tiny_teacher) if swapped else (tiny_teacher, other)
    config = parse_config(tree(student, teacher), where="test")
    losses, _ = measure_gaps(config)
    prepared = check(config, only_gaps=True)
    packer = tiny_teacher if kind == "sentence_teacher" else student  # rather one whose tokens are bytes
    assert str(packer) == prepared.packer.name
    packed = pack_rows(config, prepared.domains, prepared.packer, shown=False)["math"]
    held_out = select_rows(packed.held_out, 4)
    opened, texts = held_out.open(None), RowTexts(prepared.packer)
    ids = [opened.read([i])[0][0, : size + 1].numpy() for i, size in enumerate(held_out.num_tokens)]
    rows = [texts.of(row) for row in ids]
    opened.close()
    at = losses.domains.index("math")
    for folder, actual in (
        (student, losses.student_bits_per_byte[at]),
        (teacher, losses.teacher_bits_per_byte[at]),
    ):
        nats, size = literal_bits(folder, rows, before if folder == other else [])
        assert size == losses.num_bytes[at]
        assert nats / size / math.log(2) == pytest.approx(actual, rel=1e-5)
    in_bits = losses.loss_gap * losses.num_tokens / losses.num_bytes / math.log(2)
    bits = losses.student_bits_per_byte - losses.teacher_bits_per_byte
    assert bits.tolist() == pytest.approx(in_bits.tolist())
    assert np.isfinite(losses.gap_error).all()


def test_swapping_student_and_teacher_swaps_their_bits_per_byte(
    tree: Make, tiny_teacher: Path, other_teacher: Path
) -> None:
    """But for the rows, which are then packed with the other tokenizer and end elsewhere."""
    there, back = (
        measure_gaps(parse_config(tree(*pair, pack={"seq_len": 32}), where="test"))[0]
        for pair in ((tiny_teacher, other_teacher), (other_teacher, tiny_teacher))
    )
    assert there.num_bytes.tolist() != back.num_bytes.tolist()  # other rows of the same documents
    assert there.student_bits_per_byte.tolist() == pytest.approx(back.teacher_bits_per_byte.tolist(), rel=0.1)


def test_a_short_model_is_compared_on_the_beginnings_of_rows(
    tree: Make, tiny_teacher: Path, tmp_path: Path, other_teacher: Path
) -> None:
    """A teacher of 8 positions: fewer bytes, and no error from its position embeddings."""
    from tests.conftest import save_tiny_model

    short = save_tiny_model(
        tmp_path / "short", other_teacher, vocab_size=410, max_position_embeddings=8, seed=2
    )
    whole, cut = (
        measure_gaps(parse_config(tree(tiny_teacher, teacher), where="test"))[0]
        for teacher in (other_teacher, short)
    )
    assert (cut.num_bytes < whole.num_bytes).all()


def test_teacher_losses_are_kept_and_documents_kept_apart(
    tree: Make, tiny_teacher: Path, other_teacher: Path
) -> None:
    """A second measurement gives the same bits from the cache; with boundaries they are others."""
    config = parse_config(tree(tiny_teacher, other_teacher), where="test")
    first = measure_gaps(config)[0]
    files = {path: path.stat().st_mtime_ns for path in (config.cache_dir / "teacher_nats").iterdir()}
    again = measure_gaps(config)[0]
    assert first.to_json() == again.to_json()
    assert all(path.stat().st_mtime_ns == before for path, before in files.items())
    apart = tree(tiny_teacher, other_teacher, pack={"seq_len": 96})
    apart["trainer"]["document_boundaries"] = True
    together = tree(tiny_teacher, other_teacher, pack={"seq_len": 96})
    losses = [measure_gaps(parse_config(one, where="test"))[0] for one in (apart, together)]
    assert (losses[0].teacher_loss != losses[1].teacher_loss).all()
    assert (losses[0].student_loss != losses[1].student_loss).all()


def test_references_need_no_tokenizer_of_a_teacher(
    tree: Make, tiny_teacher: Path, other_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows, bytes and losses are those without any other teacher, and nothing is said about it; a teacher
    that could not even read them is none of anybody's business."""
    from tests.conftest import write_domain

    for name in ("code", "math"):
        write_domain(tmp_path / "cards", name, reference_loss={"model": "big", "bits_per_byte": 0.5})

    def measure(teacher: Path, **sections: Any) -> DomainLosses:
        cards = {"rows": 4, "reference": "cards"}
        made = tree(tiny_teacher, teacher, evaluation=cards, domains=[str(tmp_path / "cards")], **sections)
        return measure_gaps(parse_config(made, where="test"))[0]

    alone, beside = measure(tiny_teacher), measure(other_teacher)
    assert alone.to_json() == beside.to_json()
    assert [0.5, 0.5] == pytest.approx(beside.teacher_bits_per_byte.tolist())
    assert "different tokenizers" not in capsys.readouterr().err
    more = {"more": {"model": str(other_teacher)}}
    assert alone.to_json() == measure(other_teacher, teachers=more, default_teacher="more").to_json()


def test_training_still_wants_losses_that_compare_two_vocabularies(
    tree: Make, tiny_teacher: Path, other_teacher: Path
) -> None:
    """What `gaps` can compare is not what forward KL can learn from."""
    with pytest.raises(ModelError, match="have different tokenizers"):
        check(parse_config(tree(tiny_teacher, other_teacher), where="test"))
    measuring = tree(tiny_teacher, other_teacher, evaluation={"measures": ["forward_kl"]})
    with pytest.raises(ConfigError, match="forward_kl compares student and teacher token by token"):
        measure_gaps(parse_config(measuring, where="test"))


def test_the_command_takes_models_that_read_differently(
    tiny_teacher: Path,
    other_teacher: Path,
    tiny_domains: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two folders and cards; without a teacher the cards must name references."""
    options = ["--student", str(tiny_teacher), "--domains", str(tiny_domains), "--format", "json"]
    overrides = [
        "pack.seq_len=32", "evaluation.rows=2", "teacher.dtype=float32", f"cache_dir={tmp_path / 'cache'}"
    ]  # fmt: skip
    main(["gaps", *options, "--teacher", str(other_teacher), *overrides])
    assert '"teacher_bits_per_byte"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["gaps", *options, *[one for one in overrides if not one.startswith("teacher")]])
    assert "no card has a reference_loss" in capsys.readouterr().err


def test_a_report_is_told_what_the_numbers_rest_on(
    tree: Make, tiny_teacher: Path, other_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tokenizers: the same words on stderr and for the page; one tokenizer: nothing to say."""
    found = measure_and_tell(parse_config(tree(tiny_teacher, other_teacher), where="test"))
    assert (True, ()) == (found.same_text, found.references)
    assert found.notes[0].startswith("Student and teacher have different tokenizers and are compared on the")
    assert f"ddkmix: s{found.notes[0][1:]}\n" in capsys.readouterr().err
    alone = measure_and_tell(parse_config(tree(tiny_teacher, tiny_teacher), where="test"))
    assert (False, ()) == (alone.same_text, alone.notes)
