"""Prompt domains from card to batch, held-out loss and run: only responses are predicted."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ddkmix.common_tokenizer import refuse_prompts
from ddkmix.config import parse_config
from ddkmix.domains import load_domains
from ddkmix.errors import DataError, DdkmixError, ModelError
from ddkmix.gap_evaluator import GapEvaluator
from ddkmix.held_out import select_rows
from ddkmix.loader import DomainMixture
from ddkmix.order import locate
from ddkmix.pack import PackedDomain, pack_domains
from ddkmix.preflight import check
from ddkmix.prepare import open_mixture, open_rows
from ddkmix.records import read_lines
from ddkmix.replay import Replay
from ddkmix.report.plan import render_plan
from ddkmix.report.seen import render_seen
from ddkmix.rows import RowReader
from ddkmix.setup import train
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import EOS, ConfigTree, save_tiny_model, write_domain
from tests.prompts.cards import prompt_domain, talk

SEQ_LEN = 48
Packed = dict[str, PackedDomain]


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain of text, and one of prompts whose responses differ in length."""
    folder = tmp_path_factory.mktemp("cards")
    write_domain(folder, "code", per_shard=4)
    shards = [
        [talk(f"{i}{j}{'?' * (j % 3 + 1)}", "the sea " * (j % 4 + 1)) for j in range(9)] for i in range(2)
    ]
    prompt_domain(folder, shards, [talk(f"held {i}", "the whale " * i) for i in range(1, 4)])
    return folder


@pytest.fixture(scope="module")
def packed(cards: Path, chat_tokenizer_folder: Path) -> Packed:
    """Both, packed."""
    tokenizer = read_tokenizer(str(chat_tokenizer_folder), separator=EOS)
    domains = load_domains([str(cards)])
    return pack_domains(domains, tokenizer, seq_len=SEQ_LEN, cache_dir=cards / "cache", processes=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_folder: Path) -> Path:
    """A small model that has the chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("chat-teacher"), chat_tokenizer_folder)


# --- batches ----------------------------------------------------------------------------------------


def check_labels(packed: Packed, batch: dict[str, torch.Tensor], places: np.ndarray) -> None:
    """Labels are the tokens, but for prompts and padding; hold them against the index."""
    names = sorted(packed)
    triples = zip(
        batch["domain_ids"].tolist(), places.tolist(), batch["labels"], batch["input_ids"], strict=True
    )
    for domain, (shard, row), labels, ids in triples:
        rows = packed[names[domain]].train
        start, end = rows.prompt_tokens_at(shard, row), rows.tokens_at(shard, row)
        expected = torch.full_like(ids, -100)
        expected[start:end] = ids[start:end]
        assert expected.tolist() == labels.tolist()
        assert (names[domain] == "talk") == (start > 0) == (301 == ids[end - 1])
        assert RowReader(rows).read(shard, row).tolist() == ids.tolist()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_labels_ignore_prompts_and_padding(packed: Packed, workers: int) -> None:
    """In every batch, whoever reads it; rows of text are as they always were."""
    rows = {name: domain.train for name, domain in packed.items()}
    mixture = DomainMixture(rows, batch_rows=6, weights={"code": 0.4, "talk": 0.6}, num_workers=workers)
    for _ in range(8):
        batch = next(mixture)
        check_labels(packed, batch, mixture.row_places)
    mixture.close()


def test_the_labels_test_fails_on_other_labels(packed: Packed) -> None:
    """A prompt's last token predicted, or a response's first not."""
    mixture = DomainMixture({"talk": packed["talk"].train}, batch_rows=2)
    packed = {"talk": packed["talk"]}
    batch = next(mixture)
    check_labels(packed, batch, mixture.row_places)
    first = int((batch["labels"][0] != -100).nonzero()[0])
    for place, label in ((first - 1, int(batch["input_ids"][0, first - 1])), (first, -100)):
        broken = {**batch, "labels": batch["labels"].clone()}
        broken["labels"][0, place] = label
        with pytest.raises(AssertionError):
            check_labels(packed, broken, mixture.row_places)


def test_micro_batches(packed: Packed) -> None:
    """Are dealt the labels of their rows."""
    rows = {name: domain.train for name, domain in packed.items()}
    (whole,) = DomainMixture(rows, batch_rows=6).next_parts(1)
    parts = DomainMixture(rows, batch_rows=6).next_parts(3)
    for i, part in enumerate(parts):
        assert torch.equal(whole["labels"][i::3], part["labels"])


def test_a_row_that_stands_in_has_its_own_labels(
    tmp_path: Path, cards: Path, packed: Packed, chat_tokenizer_folder: Path
) -> None:
    """Its prompt is as long as it is, not as that of the damaged row was."""
    import shutil

    folder = Path(shutil.copytree(packed["talk"].location, tmp_path / "talk"))
    from ddkmix.pack import open_packed

    own = open_packed(str(folder), cache_dir=tmp_path)
    shard = own.train.shards[0]
    with Path(shard.location).open("r+b") as file:
        for row in range(0, shard.num_rows, 2):
            file.seek(int(shard.offsets[row]))
            file.write(b"\xff\xff")
    mixture = DomainMixture({"talk": own.train}, batch_rows=6, max_substitutes=99)
    for _ in range(3):
        batch = next(mixture)
        check_labels({"talk": own}, batch, mixture.row_places)
    assert 5 == len(mixture.substitutions)


def test_an_example_is_one_document(packed: Packed, chat_tokenizer_folder: Path, cards: Path) -> None:
    """Where documents are kept apart, by whatever separator: its positions go on to the end."""
    tokenizer = read_tokenizer(str(chat_tokenizer_folder))
    assert "<|im_end|>" == tokenizer.separator, "which ChatML puts between turns"
    domains = load_domains([str(cards)])
    packed = pack_domains(domains, tokenizer, seq_len=SEQ_LEN, cache_dir=cards / "other", processes=1)
    rows = {name: domain.train for name, domain in packed.items()}
    mixture = DomainMixture(rows, batch_rows=6, document_boundaries=True)
    found: dict[str, list[bool]] = {"code": [], "talk": []}
    for _ in range(3):
        batch = next(mixture)
        for i, positions in zip(batch["domain_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
            found[mixture.domains[i]].append(positions == list(range(SEQ_LEN)))
    assert {True} == set(found["talk"])
    assert False in found["code"]


# --- weights that count tokens ----------------------------------------------------------------------


def test_weights_of_tokens_count_responses(packed: Packed) -> None:
    """What is predicted is what a weight is a share of."""
    train = packed["talk"].train
    mixture = DomainMixture({n: d.train for n, d in packed.items()}, batch_rows=6, count="tokens")
    counted = mixture.stream.tokens_of
    assert counted is not None
    for j in range(train.num_rows):
        place = locate(mixture.stream.orders[1], j)
        assert train.tokens_at(*place) - train.prompt_tokens_at(*place) == counted(1, j)
    assert sum(counted(1, j) for j in range(train.num_rows)) == train.counted_tokens
    served = {"code": 0, "talk": 0}
    for _ in range(40):
        batch = next(mixture)
        for name, labels in zip(batch["domain_ids"].tolist(), batch["labels"], strict=True):
            served[mixture.domains[name]] += int((labels != -100).sum())
    share = served["talk"] / sum(served.values())
    assert abs(share - mixture.natural_weights[1]) < 0.02


# --- held-out losses --------------------------------------------------------------------------------


def test_held_out_rows_predict_responses(packed: Packed) -> None:
    """Their tokens with the end of the turn, and the bytes of their text."""
    held_out = select_rows(packed["talk"].held_out, 9)
    opened = held_out.open(None)
    ids, labels = opened.read([0, 1, 2])
    opened.close()
    assert held_out.num_tokens.tolist() == (labels != -100).sum(1).tolist()
    assert [len("the whale " * i) for i in range(1, 4)] == held_out.num_bytes.tolist()
    predicted = [row[label != -100] for row, label in zip(ids, labels, strict=True)]
    assert [301] * 3 == [int(row[-1]) for row in predicted]


def test_a_held_out_loss_is_that_of_responses(packed: Packed, teacher: Path) -> None:
    """Nats of the response tokens given everything before them, and bits per byte of the response's text."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    rows, nats, tokens = packed["talk"].held_out, 0.0, 0
    for shard in range(len(rows.shards)):
        for row in range(rows.shards[shard].num_rows):
            start, end = rows.prompt_tokens_at(shard, row), rows.tokens_at(shard, row)
            ids = torch.from_numpy(RowReader(rows).read(shard, row).astype(np.int64))[None, :end]
            with torch.no_grad():
                logits = model(ids).logits[0, start - 1 : end - 1].double()
            nats += float(cross_entropy(logits, ids[0, start:end], reduction="sum"))
            tokens += end - start
    losses = GapEvaluator({"talk": rows}, batch_rows=2).measure(model)
    assert ([tokens], [60]) == (losses.num_tokens.tolist(), losses.num_bytes.tolist())
    np.testing.assert_allclose([nats / tokens], losses.student_loss, rtol=1e-5)


# --- lint, plan, runs -------------------------------------------------------------------------------


@pytest.fixture
def make(tiny_config: Callable[..., ConfigTree], cards: Path, teacher: Path) -> Callable[..., ConfigTree]:
    """The config tree of a small run over both domains."""

    def config(**sections: Any) -> ConfigTree:
        return tiny_config(
            **{
                "domains": [str(cards)],
                "cache_dir": str(cards / "cache"),
                "teacher": {"model": str(teacher), "dtype": "float32"},
                **sections,
                "pack": {"seq_len": SEQ_LEN, "processes": 1, "separator": EOS, **sections.get("pack", {})},
            }
        )

    return config


def test_lint_finds_a_sound_prompt_domain(make: Callable[..., ConfigTree]) -> None:
    """Nothing is packed for it."""
    domains = check(parse_config(make(), where="test")).domains
    assert [None, "messages"] == [d.prompt_response and d.prompt_response.messages for d in domains]


def test_lint_needs_a_chat_template(make: Callable[..., ConfigTree], tiny_teacher: Path) -> None:
    """The teacher's tokenizer has none: one line, before a model is loaded."""
    with pytest.raises(ModelError, match=f"^{re.escape(str(tiny_teacher))} has no chat template"):
        check(parse_config(make(teacher={"model": str(tiny_teacher)}), where="test"))


TWO = "domain 'talk' holds prompts and responses, which are written as one tokenizer's models expect them"


def test_two_tokenizers_are_refused(
    make: Callable[..., ConfigTree], other_teacher: Path, packed: Packed
) -> None:
    """By lint where a card says so, and where only packed rows do; text is welcome."""
    tree = make(
        student={"init": "config", "layers": None, "model": str(other_teacher)},
        loss=[{"name": "uld"}],
        pack={"separator": "</s>"},
    )
    with pytest.raises(DataError, match=f"^{TWO}"):
        check(parse_config(tree, where="test"))
    with pytest.raises(DataError, match=f"^{TWO}"):
        refuse_prompts(packed["talk"].held_out)
    refuse_prompts(packed["code"].held_out)


@pytest.mark.parametrize(("separator", "refused"), [(EOS, False), ("<|im_end|>", True)])
def test_documents_kept_apart_by_what_ends_turns(
    make: Callable[..., ConfigTree], separator: str, refused: bool
) -> None:
    """The trainer tells documents by their separator, so a conversation must not hold it."""
    tree = make(trainer={"document_boundaries": True}, pack={"separator": separator})
    prepared = check(parse_config(tree, where="test"))
    if not refused:
        assert {"code", "talk"} == set(open_rows(prepared, shown=False))
        return
    with pytest.raises(DataError, match=r"domain 'talk': \d+ tokens in the text of train-0.tar are the"):
        open_rows(prepared, shown=False)


def test_plan_counts_responses(make: Callable[..., ConfigTree]) -> None:
    """Its tokens are those that are predicted."""
    config = parse_config(make(mixture={"count": "tokens"}), where="test")
    rows = open_rows(check(config), shown=False)
    mixture = open_mixture(config, rows)
    counted = rows["talk"].train.counted_tokens
    assert counted < rows["talk"].train.num_tokens
    assert f"{counted:,}" in render_plan(config, rows, mixture)


def test_a_run(make: Callable[..., ConfigTree], tmp_path: Path) -> None:
    """It trains on both domains, goes on bit for bit after a stop, and shows prompts and responses."""
    tree = make(mixture={"count": "tokens", "interval_steps": 2}, trainer={"steps": 5, "checkpoint_steps": 2})
    config = parse_config(tree, where="test")
    train(config)
    other = parse_config({**tree, "run_dir": str(tmp_path / "other")}, where="test")
    with pytest.MonkeyPatch.context() as patch:
        from ddkmix import trainer

        whole, count = trainer.train_step, iter(range(9))

        def stopping(*args: Any) -> Any:
            if next(count) == 3:
                raise KeyboardInterrupt
            return whole(*args)

        patch.setattr(trainer, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(other)
    train(other, resume=True)
    records = [
        [{k: v for k, v in line.items() if k.startswith(("step", "train/"))} for line in lines]
        for lines in (read_lines(run.run_dir / "metrics.jsonl") for run in (config, other))
    ]
    assert records[0] == records[1]
    assert 5 == len(records[0])
    seen = render_seen(config.run_dir, (1, 5), "text", domain="talk").text
    found = re.findall(
        r"<\|im_start\|>user\n\d\d\?+<\|im_end\|>\n<\|im_start\|>assistant\nthe sea [^<]*<\|im_end\|>", seen
    )
    assert len(found) == sum(row.domain == "talk" for row in Replay(config.run_dir).rows(1, 5)) > 0


def test_no_prompt_domain_is_read_without_its_tokenizer(cards: Path, tmp_path: Path, packed: Packed) -> None:
    """A card that names packed rows says nothing of prompts, and its rows do."""
    card = f"name: talk\nlicense: MIT\nrows: {packed['talk'].location}\n"
    (tmp_path / "talk.yaml").write_text(card)
    (domain,) = load_domains([str(tmp_path)])
    assert domain.prompt_response is None
    (tmp_path / "talk.yaml").write_text(card + "prompt_response: {messages: m}\n")
    with pytest.raises(DdkmixError, match="prompt_response beside rows"):
        load_domains([str(tmp_path)])
    rows = packed["talk"].train
    assert replace(rows, max_epochs=2.0).are_prompts
