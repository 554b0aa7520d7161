"""From a config to its rows and their mixture: what `pack`, `plan`, `train` and `gaps` do alike. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ddkmix.common_tokenizer import refuse_prompts
from ddkmix.config import RunConfig, Storage, Teacher
from ddkmix.domains import Domain
from ddkmix.errors import ConfigError, DataError
from ddkmix.hub import read_model_config
from ddkmix.index import DomainRows
from ddkmix.loader import DomainMixture
from ddkmix.logits_store.card import Kept, StoreCard, kept_of
from ddkmix.pack import (
    PackedDomain,
    Part,
    check_remote_shards,
    fetching_of,
    pack_domains,
    publish,
    read_packed,
)
from ddkmix.preflight import Prepared
from ddkmix.storage.location import is_remote, shown
from ddkmix.tokenizer import TokenizerCard
from ddkmix.tracking import progress_bar


def pack_rows(
    config: RunConfig,
    domains: Sequence[Domain],
    tokenizer: TokenizerCard,
    *,
    part: Part | None = None,
    shown: bool = True,
) -> dict[str, PackedDomain]:
    """The packed rows of a config's domains; what the cache lacks is packed now.

    Args:
        config: the run.
        domains: its domains.
        tokenizer: its tokenizer.
        part: pack this share of the shards, and open only the domains that are complete then.
        shown: whether there is a progress bar.

    Raises:
        DataError: see `pack.pack_domains`.
    """
    with progress_bar("pack", total=None, shown=shown) as bar:
        return pack_domains(
            domains,
            tokenizer,
            seq_len=config.pack.seq_len,
            cache_dir=config.cache_dir,
            strategy=config.pack.strategy,
            processes=config.pack.processes,
            storage=config.storage,
            part=part,
            on_shard=lambda done, total: bar.update(done, total=total),
        )


def open_rows(prepared: Prepared, *, shown: bool) -> dict[str, PackedDomain]:
    """The packed rows of a checked config, which its settings can be applied to.

    Raises:
        DataError: see `pack.pack_domains`; or documents are to be kept apart by a separator that some of them
            contain; or rows are prompts and student and teacher have different tokenizers.
    """
    packed = pack_rows(prepared.config, prepared.domains, prepared.tokenizer, shown=shown)
    for rows in (rows for domain in packed.values() for rows in (domain.train, domain.held_out)):
        if prepared.separator_id is not None:
            _check_separators(rows, prepared.tokenizer)
        if prepared.teacher_tokenizer is not None:
            refuse_prompts(rows)
    return packed


def open_mixture(
    config: RunConfig, packed: Mapping[str, PackedDomain], *, rank: int = 0, world_size: int = 1
) -> DomainMixture:
    """The mixture of a config's train rows, with natural weights until somebody sets others."""
    return DomainMixture(
        {name: domain.train for name, domain in packed.items()},
        batch_rows=config.trainer.batch_rows,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        num_workers=config.loader.workers,
        prefetch_steps=config.loader.prefetch_steps,
        max_substitutes=config.loader.max_substitutes,
        max_epochs=config.mixture.max_epochs,
        on_cap=config.mixture.on_cap,
        count=config.mixture.count,
        block_rows=config.mixture.block_rows,
        storage=storage_of(config),
    )


def storage_of(config: RunConfig) -> Storage:
    """The storage settings with the folder of spooled shards filled in."""
    folder = config.storage.folder or config.cache_dir / "shards"
    return config.storage.model_copy(update={"folder": folder})


def stores_folder(config: RunConfig) -> Path:
    """Where logits stores lie."""
    return config.capture.folder or config.cache_dir / "logits"


def store_cards(prepared: Prepared) -> dict[str, StoreCard]:
    """What the logits stores of a checked config are made of: for each domain, that of its teacher.

    Raises:
        ConfigError: more classes are to be kept than there are, or hidden states of an ensemble, or rows are
            not in the teacher's tokens.
        ModelError: a teacher's files cannot be had.
    """
    config = prepared.config
    if prepared.teacher_tokenizer is not None:
        raise ConfigError(
            f"a logits store keeps what a teacher says about rows of its own tokens, and student and teacher "
            f"{config.teacher.model} have different tokenizers; set signal.source to live."
        )
    kept = kept_of(config.capture)
    named = {t for term in prepared.terms for t in getattr(term.loss, "temperatures", ())}
    temperatures = {float(t) for t in (*named, *config.capture.temperatures)} - {1.0}
    for name, members in prepared.teachers.members.items():
        if kept.is_hidden and len(members) > 1:
            raise ConfigError(
                f"capture.keep = 'hidden', and the teacher {name!r} is an ensemble, which has no hidden "
                "states of its own; keep classes."
            )
    for model in prepared.teachers.models.values():
        _check_classes(prepared, model, kept)
    cards = {
        name: StoreCard(
            teacher=name,
            model=prepared.teachers.fingerprint(name, config.cache_dir),
            tokenizer=prepared.tokenizer.fingerprint,
            vocab_size=prepared.vocab_size,
            separator_id=prepared.separator_id,
            kept=kept,
            temperatures=() if kept.is_hidden else tuple(sorted(temperatures)),
            members=tuple(
                {"model": model.model, "revision": model.revision, "dtype": model.dtype, "share": share}
                for model, share in (
                    (prepared.teachers.models[member], share) for member, share in members.items()
                )
            ),
        )
        for name, members in prepared.teachers.members.items()
    }
    return {domain: cards[name] for domain, name in prepared.teachers.of_domain.items()}


def _check_classes(prepared: Prepared, teacher: Teacher, kept: Kept) -> None:
    model = read_model_config(teacher.model, teacher.revision)
    num_classes = prepared.vocab_size or model.get("vocab_size")
    if num_classes is not None and kept.k is not None and kept.k > num_classes:
        raise ConfigError(
            f"capture.k = {kept.k}; the teacher has {num_classes} classes, keep at most that many."
        )


def publish_rows(packed: Mapping[str, PackedDomain], out: str) -> list[Path]:
    """Copy packed rows to `<out>/<domain>/`, for cards to name under `rows`; gives these folders.

    Raises:
        ConfigError: `out` is remote.
        DataError: other rows are there, the rows are not on this machine, or `out` cannot be written.
    """
    folders = []
    for name, domain in packed.items():
        if is_remote(domain.location):
            raise DataError(
                f"domain {name!r}: its rows are at {shown(domain.location)} already; copy them there."
            )
        assert domain.manifest is not None
        folders.append(publish(Path(domain.location), domain.manifest, out, name))
    return folders


def check_remote(prepared: Prepared) -> None:
    """Ask the stores for every remote shard and every remote folder of packed rows; reads none of the data.

    Raises:
        DataError: something is empty, or packed rows do not fit the run.
        StorageError: something does not exist, or a store cannot be asked.
    """
    config = prepared.config
    documents = [domain for domain in prepared.domains if domain.rows is None]
    check_remote_shards(documents, fetching_of(config.cache_dir, config.storage))
    read_packed(
        prepared.domains,
        prepared.tokenizer,
        seq_len=config.pack.seq_len,
        cache_dir=config.cache_dir,
        storage=config.storage,
    )


def _check_separators(rows: DomainRows, tokenizer: TokenizerCard) -> None:
    """Raises DataError if a document of these rows contains the separator, which would cut it in two."""
    for shard in rows.shards:
        # a prompt and its response are one document, which ends with the end of the turn
        documents = 0 if rows.are_prompts else shard.report["documents"]
        if extra := shard.report["separators"] - documents:
            raise DataError(
                f"domain {rows.domain!r}: {extra} tokens in the text of {shard.name} are the separator "
                f"{tokenizer.separator!r}; documents cannot be kept apart by it. Set pack.separator to "
                "another special token, or trainer.document_boundaries to false."
            )
