"""Documents and rows on stores: packed from there, published there, and known by what the store states."""

import gzip
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from ddkmix.config import Storage
from ddkmix.domains import Domain
from ddkmix.errors import DataError
from ddkmix.pack import PackedDomain, open_packed, pack_domains, pack_report, packed_folders, plan_all
from ddkmix.pack.marks import check_remote_shards, fetching_of
from ddkmix.tokenizer import TokenizerCard
from tests.conftest import documents, write_shard
from tests.pack.rows import SEQ_LEN, files_of, one_domain, texts_of
from tests.storage.conftest import put_s3
from tests.storage.servers import Handler, WebServer, replaced

TRAIN = documents("code", 6, seed=1)
HELD_OUT = documents("code", 3, seed=2)


def jsonl(texts: Sequence[str]) -> bytes:
    """JSON lines, compressed."""
    return gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), mtime=0)


def pack(domain: Domain, tokenizer: TokenizerCard, cache: Path, storage: Storage) -> PackedDomain:
    """Pack one domain in this process."""
    return pack_domains([domain], tokenizer, seq_len=SEQ_LEN, cache_dir=cache, processes=1, storage=storage)[
        "code"
    ]


def web_domain(web: WebServer, folder: Path, **card: object) -> Domain:
    """Two train shards and a held-out one on a web server."""
    train = [web.put(f"en/{i}.jsonl.gz", jsonl(TRAIN[3 * i : 3 * i + 3])) for i in range(2)]
    held_out = web.put("held_out.jsonl.gz", jsonl(HELD_OUT))
    return one_domain(folder / "code.yaml", train=train, held_out=held_out, text_field="text", **card)


def test_documents_on_a_web_server_are_packed(
    tmp_path: Path, tokenizer: TokenizerCard, web: WebServer, storage: Storage
) -> None:
    """The rows are those of local files; copies are gone afterwards; a second start only asks."""
    packed = pack(web_domain(web, tmp_path), tokenizer, tmp_path / "cache", storage)
    assert TRAIN == texts_of(packed.train, tokenizer)
    assert HELD_OUT == texts_of(packed.held_out, tokenizer)
    assert [] == list((tmp_path / "cache" / "incoming").iterdir())
    sent = dict(web.sent)
    pack(web_domain(web, tmp_path), tokenizer, tmp_path / "cache", storage)
    assert {name: size + 1 for name, size in sent.items()} == web.sent  # one byte to ask what is there


def test_documents_on_s3_are_packed(
    tmp_path: Path, tokenizer: TokenizerCard, s3: str, storage: Storage
) -> None:
    """Also mixed with local files."""
    remote = put_s3(f"{s3}/a/part-0.jsonl.gz", jsonl(TRAIN[:3]))
    write_shard(tmp_path / "part-0.tar", TRAIN[3:])
    held_out = put_s3(f"{s3}/held_out.jsonl.gz", jsonl(HELD_OUT))
    domain = one_domain(
        tmp_path / "code.yaml", train=[remote, "part-0.tar"], held_out=held_out, text_field="text"
    )
    with pytest.raises(DataError, match="text_field"):  # a tar has no .text member
        pack(domain, tokenizer, tmp_path / "cache", storage)
    (tmp_path / "part-0.tar").unlink()
    write_shard(tmp_path / "part-0.tar", TRAIN[3:], extension="text")
    packed = pack(domain, tokenizer, tmp_path / "cache", storage)
    assert TRAIN == texts_of(packed.train, tokenizer)
    assert ["a__part-0.tar", f"{tmp_path.name}__part-0.tar"] == [s.name for s in packed.train.shards]


def fingerprint(domain: Domain, tokenizer: TokenizerCard, cache: Path, storage: Storage) -> str:
    """Of the rows that a domain would have."""
    (plan,) = plan_all([domain], tokenizer, seq_len=SEQ_LEN, cache_dir=cache, storage=storage)
    return plan.fingerprint


def test_a_store_that_states_nothing_has_its_shards_read(
    tmp_path: Path, tokenizer: TokenizerCard, plain_web: WebServer, storage: Storage
) -> None:
    """Without ETags the digest of the bytes is the mark; an edit of the same size changes it."""
    domain = web_domain(plain_web, tmp_path)
    before = fingerprint(domain, tokenizer, tmp_path, storage)
    assert before == fingerprint(domain, tokenizer, tmp_path, storage)
    content = plain_web.files["en/0.jsonl.gz"]
    plain_web.files["en/0.jsonl.gz"] = content[:-1] + bytes([content[-1] ^ 1])
    assert before != fingerprint(domain, tokenizer, tmp_path, storage)


def test_a_promised_digest_saves_asking(
    tmp_path: Path, tokenizer: TokenizerCard, web: WebServer, storage: Storage
) -> None:
    """With sha256 in the card the fingerprint needs no network, and what arrives is checked."""
    import hashlib

    contents = {
        "en/0.jsonl.gz": jsonl(TRAIN[:3]),
        "en/1.jsonl.gz": jsonl(TRAIN[3:]),
        "held_out.jsonl.gz": jsonl(HELD_OUT),
    }
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    domain = web_domain(web, tmp_path, sha256=sha256)
    fingerprint(domain, tokenizer, tmp_path, storage)
    assert [] == web.asked
    web.files["en/1.jsonl.gz"] = jsonl(["something else"])
    with pytest.raises(DataError, match=r"en/1\.jsonl\.gz"):
        pack(domain, tokenizer, tmp_path / "cache", storage)
    web.files["en/1.jsonl.gz"] = contents["en/1.jsonl.gz"]
    assert TRAIN == texts_of(pack(domain, tokenizer, tmp_path / "cache", storage).train, tokenizer)


def test_a_shard_that_changes_while_it_is_packed_is_refused(
    tmp_path: Path, tokenizer: TokenizerCard, web: WebServer, storage: Storage
) -> None:
    """Between planning and copying: the rows would be cached under the old content's name."""
    domain = web_domain(web, tmp_path)
    web.faults["en/0.jsonl.gz"] = [None, replaced(jsonl(["new"] * 3))]
    with pytest.raises(DataError, match=r"en/0\.jsonl\.gz was changed while it was packed; pack again\."):
        pack(domain, tokenizer, tmp_path / "cache", storage)


@pytest.mark.parametrize(
    ("kind", "message"), [("missing", "held_out.jsonl.gz"), ("empty", "is empty (0 bytes)")]
)
def test_a_remote_shard_that_is_not_there_is_named(
    tmp_path: Path, tokenizer: TokenizerCard, web: WebServer, storage: Storage, kind: str, message: str
) -> None:
    """At pack time, and by `lint --remote`."""
    domain = web_domain(web, tmp_path)
    if kind == "missing":
        del web.files["held_out.jsonl.gz"]
    else:
        web.files["held_out.jsonl.gz"] = b""
    for check in (
        lambda: pack(domain, tokenizer, tmp_path / "cache", storage),
        lambda: check_remote_shards([domain], fetching_of(tmp_path, storage)),
    ):
        with pytest.raises(DataError) as info:
            check()
        assert message in str(info.value)
        assert "\n" not in str(info.value)


def test_two_shards_of_one_content_on_s3_are_refused(
    tmp_path: Path, tokenizer: TokenizerCard, s3: str, storage: Storage
) -> None:
    """There the store's mark is a digest; a web server's may not be."""
    places = [put_s3(f"{s3}/{name}.jsonl.gz", jsonl(TRAIN)) for name in ("a", "b")]
    domain = one_domain(tmp_path / "code.yaml", train=places[0], held_out=places[1], text_field="text")
    with pytest.raises(DataError, match="has the same content as"):
        plan_all([domain], tokenizer, seq_len=SEQ_LEN, cache_dir=tmp_path, storage=storage)


# --- rows on stores ---------------------------------------------------------------------------------


def local_rows(folder: Path, tokenizer: TokenizerCard) -> tuple[PackedDomain, Path]:
    """A small domain, packed on this machine, and its folder."""
    write_shard(folder / "train-0.tar", TRAIN[:3])
    write_shard(folder / "train-1.tar", TRAIN[3:])
    write_shard(folder / "held_out.tar", HELD_OUT)
    domain = one_domain(
        folder / "local.yaml", train="train-{0,1}.tar", held_out="held_out.tar", license="MIT"
    )
    packed = pack(domain, tokenizer, folder / "cache", Storage())
    return packed, packed_folders([domain], tokenizer, SEQ_LEN, folder / "cache")["code"][0]


def serve(web: WebServer, folder: Path) -> str:
    """Publish a packed folder on the web server; its URL."""
    for name, content in files_of(folder).items():
        if not name.startswith("."):
            web.put(f"rows/{name}", content)
    return web.url("rows")


def test_rows_on_a_web_server_are_opened(
    tmp_path: Path, tokenizer: TokenizerCard, web: WebServer, storage: Storage
) -> None:
    """The same names, fingerprints and report as on the machine that packed them; no row is copied."""
    local, folder = local_rows(tmp_path, tokenizer)
    url = serve(web, folder)
    domain = one_domain(tmp_path / "remote.yaml", rows=url, max_epochs=2, prior=0.5)
    remote = pack(domain, tokenizer, tmp_path / "other", storage)
    assert local.train.fingerprint == remote.train.fingerprint
    assert [local.train.name_of(1, 0), local.held_out.name_of(0, 0)] == [
        remote.train.name_of(1, 0),
        remote.held_out.name_of(0, 0),
    ]
    assert [f"{url}/train/train-{i}.tar" for i in (0, 1)] == [s.location for s in remote.train.shards]
    assert (2, 0.5) == (remote.train.max_epochs, remote.train.prior)
    assert pack_report({"code": local}) == pack_report({"code": remote})
    assert not any(name.endswith(".tar") for name in web.sent)


def test_indices_of_remote_rows_are_copied_once(
    tmp_path: Path, tokenizer: TokenizerCard, web: WebServer, storage: Storage
) -> None:
    """At the next start only rows.json is read; a damaged copy is copied again."""
    _, folder = local_rows(tmp_path, tokenizer)
    url = serve(web, folder)
    open_packed(url, cache_dir=tmp_path / "other", storage=storage)
    sidecar = next((tmp_path / "other" / "remote").rglob("train-0.tar.index.npz"))
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[:-5])
    web.asked.clear()
    open_packed(url, cache_dir=tmp_path / "other", storage=storage)
    assert {"rows/rows.json", "rows/train/train-0.tar.index.npz"} == {asked.name for asked in web.asked}
    assert content == sidecar.read_bytes()


def test_an_index_that_is_not_the_listed_one_is_refused(
    tmp_path: Path, tokenizer: TokenizerCard, web: WebServer, storage: Storage
) -> None:
    """rows.json has its digest; a folder whose upload is half-way is not read."""
    _, folder = local_rows(tmp_path, tokenizer)
    url = serve(web, folder)
    name = "rows/train/train-0.tar.index.npz"
    web.files[name] = web.files["rows/train/train-1.tar.index.npz"]
    with pytest.raises(DataError, match=r"train-0\.tar\.index\.npz") as info:
        open_packed(url, cache_dir=tmp_path / "other", storage=storage)
    assert "\n" not in str(info.value)


def test_rows_on_s3_are_opened(tmp_path: Path, tokenizer: TokenizerCard, s3: str, storage: Storage) -> None:
    """As anywhere."""
    local, folder = local_rows(tmp_path, tokenizer)
    for name, content in files_of(folder).items():
        put_s3(f"{s3}/code/{name}", content)
    remote = open_packed(f"{s3}/code", cache_dir=tmp_path / "other", storage=storage)
    assert local.train.fingerprint == remote.train.fingerprint
    assert local.train.num_tokens == remote.train.num_tokens


def test_a_missing_folder_of_rows_is_named(tmp_path: Path, web: WebServer, storage: Storage) -> None:
    """The URL of rows.json, without the query that may hold a key."""
    with pytest.raises(DataError, match=r"rows/rows\.json") as info:
        open_packed(web.url("rows") + "?key=secret", cache_dir=tmp_path, storage=storage)
    assert "secret" not in str(info.value)


def test_a_process_has_one_copy_at_a_time(
    tmp_path: Path, tokenizer: TokenizerCard, web: WebServer, storage: Storage
) -> None:
    """However many shards there are: disk for one is enough."""
    domain = web_domain(web, tmp_path)
    incoming, most = tmp_path / "cache" / "incoming", 0

    def look(handler: Handler) -> None:
        nonlocal most
        with threading.Lock():
            most = max(most, sum(path.is_dir() for path in incoming.glob("*")))
        handler.answer()

    for name in web.files:
        web.faults[name] = [None, look, look]
    pack(domain, tokenizer, tmp_path / "cache", storage)
    assert 1 == most
