"""Packing: documents become rows of one domain, exactly, once, and in the same way every time."""

import dataclasses
import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ddkmix import token_stream
from ddkmix.domains import load_domains
from ddkmix.errors import DataError
from ddkmix.index import DomainRows, ShardIndex, index_path
from ddkmix.pack import open_packed, pack_domains, pack_report, packed_folders
from ddkmix.row_layout import Strategy
from ddkmix.rows import RowReader
from ddkmix.tokenizer import TokenizerCard, read_tokenizer
from tests.conftest import EOS, write_domain, write_shard
from tests.pack.rows import SEQ_LEN, domain_of, files_of, one_domain, packed_of


@pytest.fixture(scope="module")
def encode(tokenizer: TokenizerCard) -> Callable[[str], list[int]]:
    """Text to ids with the `tokenizers` library itself; special tokens in text are text."""
    library = Tokenizer.from_file(str(tokenizer.path))
    library.encode_special_tokens = True
    return lambda text: library.encode(text, add_special_tokens=False).ids


def stored_rows(rows: DomainRows, shard: int = 0) -> list[list[int]]:
    """All rows of a shard as its reader gives them."""
    reader = RowReader(rows)
    return [reader.read(shard, row).tolist() for row in range(rows.shards[shard].num_rows)]


def text_tokens(rows: DomainRows, shard: int = 0) -> list[int]:
    """The tokens of a shard without padding."""
    num_tokens = rows.shards[shard].num_tokens.tolist()
    return [
        token
        for row, valid in zip(stored_rows(rows, shard), num_tokens, strict=True)
        for token in row[:valid]
    ]


# --- tokens -----------------------------------------------------------------------------------------

DOCUMENTS = ["def return self", "the old man and the sea, 中文 😀", "x = 1\n\n\tprint(x)\r\n", "  spaces  "]


def test_rows_hold_the_tokens_of_the_documents(
    tmp_path: Path, tokenizer: TokenizerCard, encode: Callable[[str], list[int]]
) -> None:
    """Each document as the tokenizers library encodes it, then a separator; nothing else."""
    expected = [token for text in DOCUMENTS for token in (*encode(text), 0)]
    train = packed_of(tmp_path, tokenizer, [DOCUMENTS]).train
    assert expected == text_tokens(train)
    assert [SEQ_LEN] * train.num_rows == [len(row) for row in stored_rows(train)]


def check_holds(rows: DomainRows, expected: list[int]) -> None:
    """The first shard has these tokens, in as few rows as can be."""
    assert expected == text_tokens(rows)
    assert -(-len(expected) // rows.seq_len) == rows.num_rows
    assert len(expected) == rows.num_tokens


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    texts=st.lists(st.text(max_size=40).filter(str.strip), min_size=1, max_size=6),
    seq_len=st.integers(1, 24),
)
def test_any_documents_are_kept_whole(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: TokenizerCard,
    encode: Callable[[str], list[int]],
    texts: list[str],
    seq_len: int,
) -> None:
    """Any text and row length: all tokens are there in order, and the tokenizer can give the text back."""
    train = packed_of(tmp_path_factory.mktemp("d"), tokenizer, [texts], ["held\0out"], seq_len=seq_len).train
    check_holds(train, [token for text in texts for token in (*encode(text), 0)])
    library = Tokenizer.from_file(str(tokenizer.path))
    assert EOS.join([*texts, ""]) == library.decode(text_tokens(train), skip_special_tokens=False)


@pytest.mark.parametrize("sabotage", ["last row", "separators"])
def test_the_check_notices_tokens_that_are_dropped(
    tmp_path: Path,
    tokenizer: TokenizerCard,
    encode: Callable[[str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    sabotage: str,
) -> None:
    """A last row that is not full (as most packers drop it), or documents that run into each other."""
    rows, add = token_stream.TokenStream.rows, token_stream.TokenStream.add

    def without_last_row(stream: token_stream.TokenStream, strategy: Strategy) -> token_stream.PackedRows:
        whole = rows(stream, strategy)
        cut = {name: getattr(whole, name)[:-1] for name in ("tokens", "num_tokens", "num_bytes")}
        return dataclasses.replace(whole, **cut)

    def joined(stream: token_stream.TokenStream, documents: Sequence[str]) -> None:
        add(stream, ["".join(documents)] if documents else [])

    if sabotage == "last row":
        monkeypatch.setattr(token_stream.TokenStream, "rows", without_last_row)
    else:
        monkeypatch.setattr(token_stream.TokenStream, "add", joined)
    train = packed_of(tmp_path, tokenizer, [DOCUMENTS], ["long enough for two rows " * 4]).train
    with pytest.raises(AssertionError):
        check_holds(train, [token for text in DOCUMENTS for token in (*encode(text), 0)])


def test_the_last_row_is_padded(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """One document of 5 words gives rows of 4: the second holds what is left and three separators."""
    train = packed_of(tmp_path, tokenizer, [["abcd"]], seq_len=4).train
    (row, last) = stored_rows(train)
    assert [4, 1] == train.shards[0].num_tokens.tolist()
    assert [0, 0, 0, 0] == last
    assert 0 not in row


def test_a_row_that_is_exactly_full_has_no_padding(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Three letters and their separator fill one row of four."""
    train = packed_of(tmp_path, tokenizer, [["abc"]], seq_len=4).train
    assert [4] == train.shards[0].num_tokens.tolist()


def test_rows_never_cross_shards(
    tmp_path: Path, tokenizer: TokenizerCard, encode: Callable[[str], list[int]]
) -> None:
    """Each shard's rows hold its own documents, and its last row is padded for itself."""
    train = packed_of(tmp_path, tokenizer, [DOCUMENTS[:1], DOCUMENTS[1:2], DOCUMENTS[2:]]).train
    for shard, texts in enumerate([DOCUMENTS[:1], DOCUMENTS[1:2], DOCUMENTS[2:]]):
        assert [token for text in texts for token in (*encode(text), 0)] == text_tokens(train, shard)


def test_special_tokens_in_a_document_are_text(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Whoever writes "<|endoftext|>" into a document does not end it."""
    train = packed_of(tmp_path, tokenizer, [[f"a{EOS}b"]], seq_len=64).train
    tokens = text_tokens(train)
    assert 1 == tokens.count(0)
    assert 0 == tokens[-1]


def test_truncation_and_padding_of_the_tokenizer_are_ignored(
    tmp_path: Path, tokenizer: TokenizerCard, encode: Callable[[str], list[int]]
) -> None:
    """A model saved with a length of 4 still has its documents packed whole, and unpadded."""
    library = Tokenizer.from_file(str(tokenizer.path))
    library.enable_truncation(4)
    library.enable_padding(length=50, pad_id=7)
    library.save(str(tmp_path / "tokenizer.json"))
    train = packed_of(tmp_path, read_tokenizer(str(tmp_path), separator=EOS), [DOCUMENTS]).train
    check_holds(train, [token for text in DOCUMENTS for token in (*encode(text), 0)])


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    """Ids from 65536 on do not wrap around."""
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 1, "b": 65536, "c": 70000}, "unk_token": "a"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    card = read_tokenizer(str(tmp_path), separator="c")
    train = packed_of(tmp_path, card, [["a b a b"]], seq_len=5).train
    assert [[1, 65536, 1, 65536, 70000]] == stored_rows(train)
    assert "<u4" == train.shards[0].dtype


def test_a_small_vocabulary_is_stored_in_two_bytes(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """300 tokens fit."""
    assert "<u2" == packed_of(tmp_path, tokenizer, [["a"]]).train.shards[0].dtype


# --- strategies -------------------------------------------------------------------------------------


def test_best_fit_by_hand(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Rows of 8, documents of 6, 4, 4 and 2 tokens with their separators: two full rows, no document cut.

    Concatenated, the same tokens also fill two rows and cut the second document.
    """
    texts = ["qwxyz", "jkq", "zyx", "b"]
    report, rows = {}, {}
    for strategy in ("concatenate", "best_fit"):
        packed = packed_of(tmp_path, tokenizer, [texts], seq_len=8, strategy=strategy)
        rows[strategy] = stored_rows(packed.train)
        report[strategy] = pack_report({"code": packed})["code"]["train"]
    library = Tokenizer.from_file(str(tokenizer.path))
    spoken = [library.decode(row, skip_special_tokens=False).split(EOS)[:-1] for row in rows["best_fit"]]
    assert [["qwxyz", "b"], ["jkq", "zyx"]] == spoken
    assert [0, 1] == [report[name]["truncated"] for name in ("best_fit", "concatenate")]
    assert [0, 0] == [report[name]["padding"] for name in ("best_fit", "concatenate")]
    assert [2, 2] == [report[name]["rows"] for name in ("best_fit", "concatenate")]


def test_padding_and_cut_documents_are_reported(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """A document of 9 tokens does not fit into a row of 8: a full row and a remainder with 7 of padding."""
    packed = packed_of(tmp_path, tokenizer, [["qwxyzjkq"]], seq_len=8, strategy="best_fit")
    report = pack_report({"code": packed})["code"]["train"]
    assert (1, 1, 1, 9, 7) == tuple(
        report[name] for name in ("documents", "truncated", "separators", "tokens", "padding")
    )
    assert 7 / 16 == report["padding_share"]


# --- bytes ------------------------------------------------------------------------------------------


def test_bytes_by_hand(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """'aé😀中' is 1 + 2 + 4 + 3 = 10 bytes in ten one-byte tokens and a separator.

    A character's bytes count where its first token does. Rows of four: a e e | 😀 ... The first token of a
    row is not predicted, so its bytes count nowhere: a's 1 in row 0, none in rows 1 and 2, which begin
    inside 😀 and 中.
    """
    train = packed_of(tmp_path, tokenizer, [["aé😀中"]], seq_len=4).train
    assert [4, 4, 3] == train.shards[0].num_tokens.tolist()
    assert [6, 3, 0] == train.shards[0].num_bytes.tolist()


def test_bytes_add_up_to_the_text(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """In one row that holds everything, only the first token's byte (an @) is missing."""
    train = packed_of(tmp_path, tokenizer, [["@", *DOCUMENTS]], seq_len=400).train
    size = len("".join(DOCUMENTS).encode())
    assert [size] == train.shards[0].num_bytes.tolist()
    assert size + 1 == train.shards[0].report["bytes"]


def check_bytes_telescope(shard: ShardIndex, texts: Sequence[str], library: Tokenizer) -> None:
    """Row by row: the bytes of text between the end of the row's first token and the end of its last."""
    ends, before = [], 0
    for text in texts:
        encoding = library.encode(text, add_special_tokens=False)
        ends += [before + len(text[:end].encode()) for _, end in encoding.offsets]
        before += len(text.encode())
        ends.append(before)
    rows = [ends[start : start + shard.seq_len] for start in range(0, len(ends), shard.seq_len)]
    assert [row[-1] - row[0] for row in rows] == shard.num_bytes.tolist()
    assert before == shard.report["bytes"]


text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé😀中\u0301 \n")), max_size=30)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(texts=st.lists(text.filter(str.strip), min_size=1, max_size=6), seq_len=st.integers(1, 24))
def test_bytes_telescope(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: TokenizerCard, texts: list[str], seq_len: int
) -> None:
    """Bits per byte need the bytes that the predicted tokens cover, for any script and row length."""
    train = packed_of(tmp_path_factory.mktemp("d"), tokenizer, [texts], ["held\0out"], seq_len=seq_len).train
    check_bytes_telescope(train.shards[0], texts, Tokenizer.from_file(str(tokenizer.path)))


def test_counting_characters_fails_the_byte_check(
    tmp_path: Path, tokenizer: TokenizerCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check notices code that takes a character for a byte."""
    monkeypatch.setattr(token_stream, "utf8_lengths", lambda text: np.ones(len(text), dtype=np.int64))
    train = packed_of(tmp_path, tokenizer, [["aé😀中"]]).train
    with pytest.raises(AssertionError):
        check_bytes_telescope(train.shards[0], ["aé😀中"], Tokenizer.from_file(str(tokenizer.path)))


def test_a_normaliser_that_shortens_text_keeps_its_bytes(tmp_path: Path) -> None:
    """Stripped and lower-cased text still counts as long as it is on disk."""
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Strip", "strip_left": True, "strip_right": True},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"é": 0, "b": 1, "sep": 2}, "unk_token": "b"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    card = read_tokenizer(str(tmp_path), separator="sep")
    train = packed_of(tmp_path, card, [["  É b   ", " B "]], seq_len=8).train
    assert [[0, 1, 2, 1, 2]] == [row[:5] for row in stored_rows(train)]
    assert [9 + 3 - 4] == train.shards[0].num_bytes.tolist()  # all but "  É"


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:unclosed file")  # webdataset leaves closing to the garbage collector
def test_webdataset_reads_the_rows(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """A packed shard is a plain WebDataset of .npy members; the reader's offsets give the same rows."""
    train = packed_of(tmp_path, tokenizer, [DOCUMENTS]).train
    samples = list(webdataset.WebDataset(train.shards[0].location, shardshuffle=False).decode())
    assert stored_rows(train) == [sample["npy"].tolist() for sample in samples]
    assert [f"{row:06d}" for row in range(train.num_rows)] == [sample["__key__"] for sample in samples]


def test_offsets_point_at_the_first_token(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """The bytes of the tar at a row's offset are its tokens."""
    shard = packed_of(tmp_path, tokenizer, [DOCUMENTS]).train.shards[0]
    data = Path(shard.location).read_bytes()
    with tarfile.open(Path(shard.location)) as tar:
        for row, member in enumerate(tar):
            tokens = np.load(io.BytesIO(tar.extractfile(member).read()))
            assert tokens.tobytes() == data[shard.offsets[row] :][: tokens.nbytes]


@pytest.fixture
def two_domains(tmp_path: Path) -> Path:
    """Cards of two domains, two train shards each."""
    for name in ("code", "math"):
        write_domain(tmp_path, name, shards=2, per_shard=3)
    return tmp_path


def pack_all(folder: Path, tokenizer: TokenizerCard, cache: Path, *, processes: int = 1) -> Path:
    """Pack all cards of a folder; gives the folder of rows."""
    cards = load_domains([str(folder)])
    pack_domains(cards, tokenizer, seq_len=SEQ_LEN, cache_dir=cache, processes=processes)
    return cache / "rows"


def test_packing_gives_the_same_bytes_on_any_number_of_processes(
    two_domains: Path, tokenizer: TokenizerCard
) -> None:
    """Two processes write exactly the files that one writes."""
    expected = files_of(pack_all(two_domains, tokenizer, two_domains / "one"))
    assert 2 * (3 * 3 + 1) == len(expected)  # rows, index and digests of three shards, and rows.json
    assert expected == files_of(pack_all(two_domains, tokenizer, two_domains / "two", processes=2))


def test_interrupted_packing_goes_on(two_domains: Path, tokenizer: TokenizerCard) -> None:
    """Some shards done, one without its index, one cut, one never begun: the result is the same.

    Shards whose index is there are not touched again.
    """
    rows = pack_all(two_domains, tokenizer, two_domains / "cache")
    expected = files_of(rows)
    (code,) = rows.glob("code-*")
    (math,) = rows.glob("math-*")
    index_path(code / "train" / "train-000000.tar").unlink()
    index_path(code / "train" / "train-000001.tar").unlink()
    os.truncate(code / "train" / "train-000001.tar", 700)
    (code / "train" / ".train-000001.tar.99999.tmp").write_bytes(b"left by a process that was killed")
    shutil.rmtree(math)
    untouched = (code / "held_out" / "held_out-000000.tar").stat()
    pack_all(two_domains, tokenizer, two_domains / "cache")
    assert expected == files_of(rows)
    assert untouched.st_mtime_ns == (code / "held_out" / "held_out-000000.tar").stat().st_mtime_ns


def test_a_shard_without_its_index_is_packed_again(two_domains: Path, tokenizer: TokenizerCard) -> None:
    """The index is written last and vouches for the rows."""
    domains = load_domains([str(two_domains)])
    cache = two_domains / "cache"
    folder, _ = packed_folders(domains, tokenizer, SEQ_LEN, cache)["code"]
    pack_all(two_domains, tokenizer, cache)
    index_path(folder / "train" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_packed(str(folder), cache_dir=cache)
    pack_all(two_domains, tokenizer, cache)
    assert open_packed(str(folder), cache_dir=cache).train.num_rows > 0


def test_packing_twice_packs_once(two_domains: Path, tokenizer: TokenizerCard) -> None:
    """Progress tells how many shards were still to do: six, then none."""
    domains, calls = load_domains([str(two_domains)]), []
    for _ in range(2):
        pack_domains(
            domains,
            tokenizer,
            seq_len=SEQ_LEN,
            cache_dir=two_domains / "cache",
            processes=1,
            on_shard=lambda done, total: calls.append((done, total)),
        )
    assert [(0, 6), (1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6), (0, 0)] == calls


@pytest.mark.parametrize("damage", ["rows", "index"])
def test_damaged_packed_files_are_refused(two_domains: Path, tokenizer: TokenizerCard, damage: str) -> None:
    """A cut tar or index in the cache gives one line that says what to delete."""
    rows = pack_all(two_domains, tokenizer, two_domains / "cache")
    shard = next(rows.glob("code-*")) / "train" / "train-000000.tar"
    os.truncate(shard if damage == "rows" else index_path(shard), 600)
    with pytest.raises(DataError) as info:
        pack_all(two_domains, tokenizer, two_domains / "cache")
    assert str(shard) in str(info.value)
    assert "elete its folder to pack again" in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_shard_that_cannot_be_read_is_named(
    two_domains: Path, tokenizer: TokenizerCard, processes: int
) -> None:
    """Also when another process reads it; shards that were packed before it stay packed."""
    shard = two_domains / "math" / "train-000001.tar"
    os.truncate(shard, 1536)
    with pytest.raises(DataError, match="no tar end mark") as info:
        pack_all(two_domains, tokenizer, two_domains / "cache", processes=processes)
    assert str(shard) in str(info.value)
    assert [] == [name for name in files_of(two_domains / "cache" / "rows") if name.endswith(".tmp")]


def test_a_cache_that_cannot_be_written_is_named(two_domains: Path, tokenizer: TokenizerCard) -> None:
    """Here a file stands where the folder should be."""
    (two_domains / "cache").write_text("not a folder")
    with pytest.raises(DataError, match="cache") as info:
        pack_all(two_domains, tokenizer, two_domains / "cache")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("digests.json", 0),
        ("held_out-000000.tar.npy", 1),
        ("train-000000.tar", 3),  # digests, rows and index of the first shard
        ("train-000000.tar", 4),
        ("train-000000.tar", 5),
        ("rows.json", 21),
    ],
)
def test_a_full_disk_is_named(
    two_domains: Path, tokenizer: TokenizerCard, monkeypatch: pytest.MonkeyPatch, file: str, number: int
) -> None:
    """Whichever file finds no space: one line names it, nothing half-written is left, and packing goes on.

    The disk is the operating system's; its `fsync` refuses one file.
    """
    expected = files_of(pack_all(two_domains, tokenizer, two_domains / "expected"))
    calls = iter(range(100))

    def full(_: int) -> None:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DataError, match=rf"{file} cannot be written \(No space left on device\); free sp"
        ):
            pack_all(two_domains, tokenizer, two_domains / "cache")
    assert [] == [name for name in files_of(two_domains / "cache") if name.endswith(".tmp")]
    assert expected == files_of(pack_all(two_domains, tokenizer, two_domains / "cache"))


# --- what is dropped or refused ---------------------------------------------------------------------


def test_dropped_documents_are_counted_by_reason(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Blank documents and train documents that stand in the held-out split; everything else is kept."""
    held_out = ["secret", "other", " "]
    packed = packed_of(
        tmp_path, tokenizer, [["a", "secret", "", "secret "], ["other", "\n\t", "b", "b", "other"]], held_out
    )
    report = pack_report({"code": packed})["code"]
    assert {"empty": 2, "duplicate of held-out": 3} == report["train"]["dropped"]
    assert {"empty": 1} == report["held_out"]["dropped"]
    assert 4 == report["train"]["documents"]
    assert 2 == report["held_out"]["documents"]
    assert len("asecret bb") == report["train"]["bytes"]
    assert {"duplicate of held-out": 1, "empty": 1} == packed.train.shards[0].report["dropped"]


def test_the_report_counts_rows_and_tokens(
    tmp_path: Path, tokenizer: TokenizerCard, encode: Callable[[str], list[int]]
) -> None:
    """Tokens with their separators; bytes per token over all of them."""
    packed = packed_of(tmp_path, tokenizer, [DOCUMENTS[:2], DOCUMENTS[2:]])
    report = pack_report({"code": packed})["code"]["train"]
    tokens = sum(len(encode(text)) + 1 for text in DOCUMENTS)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    padding = packed.train.num_rows * SEQ_LEN - tokens
    assert {
        "documents": 4,
        "truncated": 2,  # the second of each shard
        "separators": 4,
        "tokens": tokens,
        "padding": padding,
        "bytes": size,
        "dropped": {},
        "repeated": 0,
        "rows": packed.train.num_rows,
        "padding_share": round(padding / (tokens + padding), 6),
        "bytes_per_token": round(size / tokens, 3),
    } == report


def test_a_shard_whose_documents_are_all_dropped_has_no_rows(
    tmp_path: Path, tokenizer: TokenizerCard
) -> None:
    """Its domain goes on with the other shards."""
    train = packed_of(tmp_path, tokenizer, [["secret"], ["a"]], ["secret", "other"]).train
    assert [0, 1] == [shard.num_rows for shard in train.shards]


@pytest.mark.parametrize(
    ("split", "train", "held_out"), [("train", ["secret"], ["secret", "other"]), ("held_out", ["a"], [" "])]
)
def test_a_split_without_text_is_refused(
    tmp_path: Path, tokenizer: TokenizerCard, split: str, train: list[str], held_out: list[str]
) -> None:
    """One line with the domain and the split."""
    with pytest.raises(DataError, match=f"domain 'code': its {split} shards hold no text.*; add documents"):
        packed_of(tmp_path, tokenizer, [train], held_out)


def test_two_shards_of_one_content_are_refused(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Under another name, in another domain: a shard belongs to one split of one domain."""
    domain_of(tmp_path, "code", [["a"], ["b"]], ["c"])
    domain_of(tmp_path, "math", [["b"]], ["d"])
    with pytest.raises(DataError) as info:
        pack_all(tmp_path, tokenizer, tmp_path / "cache")
    assert (
        f"{tmp_path}/math/train-000000.tar has the same content as {tmp_path}/code/train-000001.tar; a "
        "shard belongs to one split of one domain. Remove one of them from its card."
    ) == str(info.value)


def test_held_out_shards_that_equal_train_shards_are_refused(
    tmp_path: Path, tokenizer: TokenizerCard
) -> None:
    """Measuring on what was learned would hide the gap."""
    domain_of(tmp_path, "code", [["a", "b"]], ["a", "b"])
    with pytest.raises(DataError, match="has the same content as"):
        pack_all(tmp_path, tokenizer, tmp_path / "cache")


def test_two_shards_of_one_file_name_have_rows_of_different_names(
    tmp_path: Path, tokenizer: TokenizerCard
) -> None:
    """Row names take as much of the path as it needs; train and held-out rows never meet."""
    for folder, text in (("en", "a"), ("fr", "b"), ("held_out", "c")):
        write_shard(tmp_path / folder / "0.tar", [text])
    domain = one_domain(tmp_path / "code.yaml", train="{en,fr}/0.tar", held_out="held_out/0.tar")
    packed = pack_domains([domain], tokenizer, seq_len=4, cache_dir=tmp_path / "cache", processes=1)["code"]
    assert ["code/en__0.tar#0", "code/fr__0.tar#0"] == [packed.train.name_of(i, 0) for i in range(2)]
    assert "code/0.tar#0" == packed.held_out.name_of(0, 0)


# --- names and fingerprints -------------------------------------------------------------------------


def test_rows_of_a_domain_do_not_depend_on_other_domains(two_domains: Path, tokenizer: TokenizerCard) -> None:
    """Folder, fingerprint, names and bytes of code's rows are the same with and without math."""

    def code_of(cards: str, cache: str) -> tuple[str, list[str], dict[str, bytes]]:
        domains = load_domains([str(two_domains / cards)])
        packed = pack_domains(
            domains, tokenizer, seq_len=SEQ_LEN, cache_dir=two_domains / cache, processes=1
        )["code"].train
        names = [packed.name_of(s, r) for s in range(2) for r in range(packed.shards[s].num_rows)]
        (folder,) = (two_domains / cache / "rows").glob("code-*")
        return packed.fingerprint, names, files_of(folder)

    assert code_of("code.yaml", "alone") == code_of("*.yaml", "together")


def fingerprints(folder: Path, tokenizer: TokenizerCard, *, seq_len: int = SEQ_LEN) -> dict[str, str]:
    """The fingerprint of each domain of a folder; nothing is packed for it."""
    cards = load_domains([str(folder)])
    folders = packed_folders(cards, tokenizer, seq_len, folder / "cache")
    return {name: fingerprint for name, (_, fingerprint) in folders.items()}


def test_fingerprints_do_not_depend_on_time_or_place(
    two_domains: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: TokenizerCard
) -> None:
    """A copy in another folder, touched, has the same fingerprints; so caches and logits stay good."""
    expected = fingerprints(two_domains, tokenizer)
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(two_domains, copy, ignore=shutil.ignore_patterns("cache"))
    for path in copy.rglob("*.tar"):
        os.utime(path, ns=(1, 1))
    assert expected == fingerprints(copy, tokenizer)


def test_settings_that_change_no_row_change_no_fingerprint(
    two_domains: Path, tokenizer: TokenizerCard
) -> None:
    """Licence, description, limits and priors are no part of the rows."""
    expected = fingerprints(two_domains, tokenizer)
    for name in ("code", "math"):
        write_domain(
            two_domains, name, shards=2, per_shard=3, description="x", max_epochs=2, prior=3, license="MIT"
        )
    assert expected == fingerprints(two_domains, tokenizer)


def test_fingerprints_change_with_a_document(two_domains: Path, tokenizer: TokenizerCard) -> None:
    """An edit in one shard changes its domain and no other, also when size and name stay the same."""
    before = fingerprints(two_domains, tokenizer)
    shard = two_domains / "math" / "train-000001.tar"
    data, stat = bytearray(shard.read_bytes()), shard.stat()
    data[512] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = fingerprints(two_domains, tokenizer)
    assert before["code"] == after["code"]
    assert before["math"] != after["math"]


def test_fingerprints_change_with_the_row_length(two_domains: Path, tokenizer: TokenizerCard) -> None:
    """Rows of another length are other rows."""
    short, long = fingerprints(two_domains, tokenizer), fingerprints(two_domains, tokenizer, seq_len=32)
    assert short["code"] != long["code"]


def test_fingerprints_change_with_the_strategy(two_domains: Path, tokenizer: TokenizerCard) -> None:
    """The same documents best-fitted are other rows, in a folder of their own."""
    cards = load_domains([str(two_domains)])
    folders = [
        packed_folders(cards, tokenizer, SEQ_LEN, two_domains / "cache", strategy)["code"]
        for strategy in ("concatenate", "best_fit")
    ]
    assert folders[0][0] != folders[1][0]
    assert folders[0][1] != folders[1][1]


def test_fingerprints_change_with_the_tokenizer(
    two_domains: Path, tokenizer: TokenizerCard, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Another vocabulary, or only another separator, gives other rows."""
    before = fingerprints(two_domains, tokenizer)["code"]
    other = read_tokenizer(str(tokenizer_folder), separator="a")
    assert before != fingerprints(two_domains, other)["code"]
    tree = json.loads(tokenizer.path.read_text())
    tree["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "tokenizer.json").write_text(json.dumps(tree))
    assert before != fingerprints(two_domains, read_tokenizer(str(tmp_path / "lower"), separator=EOS))["code"]


def test_both_splits_have_their_own_fingerprint(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Train rows and held-out rows are never taken for each other."""
    packed = packed_of(tmp_path, tokenizer, [["a"]])
    assert packed.train.fingerprint != packed.held_out.fingerprint
