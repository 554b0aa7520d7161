"""Packing prompts and responses: one example a row, the same bytes whoever packs, and what runs know."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from ddkmix.domains import load_domains
from ddkmix.errors import ConfigError, DataError
from ddkmix.index import DomainRows, read_index
from ddkmix.pack import PackedDomain, open_packed, pack_domains, pack_report, packed_folders, publish
from ddkmix.pack.manifest import parse_manifest
from ddkmix.report.packing import render_packing
from ddkmix.rows import RowReader
from ddkmix.tokenizer import TokenizerCard, read_tokenizer
from tests.conftest import EOS, write_shard
from tests.pack.rows import files_of
from tests.prompts.cards import prompt_domain, talk

SEQ_LEN = 64


@pytest.fixture(scope="session")
def tokenizer(chat_tokenizer_folder: Path) -> TokenizerCard:
    """ChatML's tokens, and a separator that it does not use."""
    return read_tokenizer(str(chat_tokenizer_folder), separator=EOS)


def packed_of(folder: Path, tokenizer: TokenizerCard, *, processes: int = 1, **options: Any) -> PackedDomain:
    """The packed rows of the only card."""
    (packed,) = pack_domains(
        load_domains([str(folder)]),
        tokenizer,
        seq_len=SEQ_LEN,
        cache_dir=folder / "cache",
        processes=processes,
        **options,
    ).values()
    return packed


def texts_of(rows: DomainRows, tokenizer: TokenizerCard) -> list[list[str]]:
    """Prompt, response and padding of each row as text."""
    library, reader, texts = Tokenizer.from_file(str(tokenizer.path)), RowReader(rows), []
    for number, shard in enumerate(rows.shards):
        for row in range(shard.num_rows):
            p, n = rows.prompt_tokens_at(number, row), rows.tokens_at(number, row)
            ids = reader.read(number, row).tolist()
            parts = ids[:p], ids[p:n], ids[n:]
            texts.append([library.decode(part, skip_special_tokens=False) for part in parts])
    return texts


TRAIN = [
    [talk("Why?", "So."), talk("the sea", "night"), talk("Why?", " ")],
    [talk("old", "man " * 99), talk("Who?", "Me."), talk("held", "out"), talk("Who?", "Me.")],
]
HELD_OUT = [talk("held", "out"), talk("the whale", "was dark")]


def ask(question: str) -> str:
    """What ChatML makes of a question."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_domain(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Rows hold one example each; what is left out, and why, stands in the report."""
    prompt_domain(tmp_path, TRAIN, HELD_OUT)
    packed = packed_of(tmp_path, tokenizer)
    found = texts_of(packed.train, tokenizer)
    expected = [("Why?", "So."), ("the sea", "night"), ("Who?", "Me."), ("Who?", "Me.")]
    assert [[ask(q), f"{a}<|im_end|>"] for q, a in expected] == [row[:2] for row in found]
    assert {EOS} == {row[2][: len(EOS)] for row in found}
    assert [[2, 2], 301] == [[s.num_rows for s in packed.train.shards], packed.train.end_of_turn_id]
    report = pack_report({"talk": packed})
    train = report["talk"]["train"]
    assert {"duplicate of held-out": 1, "empty response": 1, "response longer than the row": 1} == train[
        "dropped"
    ]
    assert (4, 4, 1) == (train["documents"], train["rows"], train["repeated"])
    prompts = packed.train.places.num_prompt_tokens
    assert prompts is not None
    assert int(prompts.sum()) == train["prompt_tokens"] == report["total"]["train"]["prompt_tokens"]
    assert "1 response longer than the row" in render_packing(report, "table")


def test_the_bytes_predicted_are_the_responses(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Of every row, and so bits per byte are over text that is predicted."""
    prompt_domain(tmp_path, TRAIN, HELD_OUT)
    packed = packed_of(tmp_path, tokenizer)
    assert [[3, 5], [3, 3]] == [shard.num_bytes.tolist() for shard in packed.train.shards]
    assert [[3, 8]] == [shard.num_bytes.tolist() for shard in packed.held_out.shards]


@pytest.mark.parametrize("order", [(1,), (3, 1)])
def test_the_same_bytes_for_any_number_of_processes(
    tmp_path: Path, tokenizer: TokenizerCard, order: Sequence[int]
) -> None:
    """And in parts, in another order, and again."""
    shutil.copytree(prompt_domain(tmp_path / "a", TRAIN, HELD_OUT).parent, tmp_path / "b")
    packed_of(tmp_path / "a", tokenizer, processes=2)
    from ddkmix.pack import parse_part

    for number in order:
        cards = load_domains([str(tmp_path / "b")])
        part = parse_part(f"{number}/3")
        cache = tmp_path / "b" / "cache"
        pack_domains(cards, tokenizer, seq_len=SEQ_LEN, cache_dir=cache, processes=1, part=part)
    packed_of(tmp_path / "b", tokenizer)
    rows = [files_of(tmp_path / side / "cache" / "rows") for side in ("a", "b")]
    assert rows[0] == rows[1]
    assert 10 == len(rows[0]), "three shards with index and digests, and rows.json"


def test_a_held_out_share(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Chosen by the example's content: all of it on one side, each once."""
    examples = [talk(f"{i}?", "a") for i in range(60)]
    prompt_domain(tmp_path, [examples], [], card={"held_out": {"share_of_train": 0.3}})
    packed = packed_of(tmp_path, tokenizer)
    sides = [{row[0] for row in texts_of(rows, tokenizer)} for rows in (packed.train, packed.held_out)]
    assert {ask(f"{i}?") for i in range(60)} == sides[0] | sides[1]
    assert not sides[0] & sides[1]
    assert 8 < len(sides[1]) < 30


def test_rows_are_other_rows_when_the_writing_changes(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Fields, template, end of turn and what becomes of long responses; but not the strategy of text."""
    prompt_domain(tmp_path, TRAIN, HELD_OUT)
    (domain,) = load_domains([str(tmp_path)])
    assert domain.prompt_response is not None
    fields = {"prompt": "p", "response": "r"}
    kinds = [
        domain.prompt_response,
        *(
            type(domain.prompt_response).model_validate(card)
            for card in (
                {"messages": "m"},
                {"messages": "messages", "long_responses": "cut"},
                {"messages": "messages", "end_of_turn": EOS},
                fields,
                {**fields, "template": "{prompt}"},
            )
        ),
    ]
    found = [
        packed_folders([dataclasses.replace(domain, prompt_response=kind)], tokenizer, SEQ_LEN, tmp_path)
        for kind in kinds
    ]
    assert len(kinds) == len({one["talk"][1] for one in found})
    best_fit = packed_folders([domain], tokenizer, SEQ_LEN, tmp_path, strategy="best_fit")
    assert found[0] == best_fit


def test_another_chat_template_makes_other_rows(
    tmp_path: Path, tokenizer: TokenizerCard, chat_tokenizer_folder: Path
) -> None:
    """Though text would be packed alike."""
    prompt_domain(tmp_path, TRAIN, HELD_OUT)
    folder = Path(shutil.copytree(chat_tokenizer_folder, tmp_path / "tokenizer"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "Chat: " + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    other = read_tokenizer(str(folder), separator=EOS)
    assert tokenizer.fingerprint == other.fingerprint
    cards = load_domains([str(tmp_path)])
    folders = [packed_folders(cards, one, SEQ_LEN, tmp_path)["talk"] for one in (tokenizer, other)]
    assert folders[0] != folders[1]


def test_published_rows_say_what_they_are(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """rows.json has the end of a turn; an index, each prompt's length; a card of rows, neither."""
    prompt_domain(tmp_path, TRAIN, HELD_OUT)
    packed = packed_of(tmp_path, tokenizer)
    assert packed.manifest is not None
    folder = publish(Path(packed.location), packed.manifest, str(tmp_path / "out"), "talk")
    again = open_packed(str(folder), cache_dir=tmp_path / "cache")
    assert (True, 301, 301) == (
        again.train.are_prompts,
        again.train.end_of_turn_id,
        again.held_out.end_of_turn_id,
    )
    assert texts_of(packed.train, tokenizer) == texts_of(again.train, tokenizer)
    assert ("<|im_end|>", "prompts") == (packed.manifest.end_of_turn, packed.manifest.strategy)
    broken = json.loads((folder / "rows.json").read_text()) | {"end_of_turn_id": "x"}
    with pytest.raises(DataError, match=r"not a rows.json that ddkmix wrote"):
        parse_manifest(json.dumps(broken).encode(), "rows.json")


def test_rows_of_text_are_as_they_were(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """No column in their index, no key in their rows.json, and none of a prompt's."""
    write_shard(tmp_path / "t" / "a.tar", ["the old man"])
    write_shard(tmp_path / "t" / "b.tar", ["the sea"])
    card = {"name": "t", "train": "t/a.tar", "held_out": "t/b.tar", "license": "CC0-1.0"}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(card))
    packed = packed_of(tmp_path, tokenizer)
    folder = Path(packed.location)
    with np.load(folder / "train" / "a.tar.index.npz") as arrays:
        assert "num_prompt_tokens" not in arrays
    assert "end_of_turn" not in (folder / "rows.json").read_text()
    assert "prompt_tokens" not in packed.train.shards[0].report
    assert read_index(folder / "train" / "a.tar").num_prompt_tokens is None
    rows = packed.train
    assert (False, None, 0) == (rows.are_prompts, rows.end_of_turn_id, rows.prompt_tokens_at(0, 0))
    assert [0] == rows.prompt_tokens(np.array([0]), np.array([0])).tolist()
    assert rows.num_tokens == rows.counted_tokens == rows.counted_tokens_at(0, 0)


def test_a_split_without_an_example(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """The line says what was there."""
    prompt_domain(tmp_path, [[talk("a", ""), talk("b", " "), talk("c", "d " * 99)]], HELD_OUT)
    with pytest.raises(DataError) as info:
        packed_of(tmp_path, tokenizer)
    assert (
        "domain 'talk': its train shards hold no text (left out: 2 empty response, 1 response longer than "
        "the row); add documents."
    ) == str(info.value)


def test_prompts_and_text_in_one_domain(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Cannot be."""
    prompt_domain(tmp_path, TRAIN, HELD_OUT)
    packed = packed_of(tmp_path, tokenizer)
    text = dataclasses.replace(packed.train.shards[0], num_prompt_tokens=None)
    with pytest.raises(DataError, match="some shards of a domain hold prompts and others text"):
        dataclasses.replace(packed.train, shards=(text, packed.train.shards[1]))


def test_a_tokenizer_that_cannot(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """The card is named before anything is read."""
    card = prompt_domain(
        tmp_path, TRAIN, HELD_OUT, card={"prompt_response": {"messages": "m", "end_of_turn": "<x>"}}
    )
    with pytest.raises(ConfigError) as info:
        packed_of(tmp_path, tokenizer)
    assert str(info.value).startswith(f"{card}: prompt_response.end_of_turn = '<x>' is not a token of")
