"""Datasets that a user already has: what counts as one, how it is known again, and its mistakes."""

import random
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from ddkmix import DomainMixture
from ddkmix.errors import ConfigError, DataError
from ddkmix.own_rows import MapDataset, count_items, integers, own_rows, read_item

WORDS = [{"text": f"word {i}", "input_ids": list(range(i + 1))} for i in range(20)]


def fingerprint(dataset: MapDataset, **options: Any) -> str:
    """Of one domain's dataset."""
    return own_rows({"code": dataset}, **options)["code"].fingerprint


class Squares(Dataset[Any]):
    """A torch dataset."""

    def __init__(self, count: Any = 20) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count  # type: ignore[no-any-return]

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([i, i * i])


def hugging_face(kind: str | None = None) -> Any:
    """A `datasets.Dataset`, with or without a format."""
    from datasets import Dataset as Table

    table = Table.from_list(WORDS)
    return table.with_format(kind) if kind else table


DATASETS: Mapping[str, Callable[[], Any]] = {
    "list": lambda: WORDS,
    "tuple": lambda: tuple(WORDS),
    "array": lambda: np.arange(40).reshape(20, 2),
    "tensor": lambda: torch.arange(40).reshape(20, 2),
    "range": lambda: range(20),
    "torch": Squares,
    "tensors": lambda: TensorDataset(torch.arange(20)),
    "subset": lambda: Subset(Squares(40), range(5, 25)),
    "concat": lambda: ConcatDataset([Squares(8), Squares(12)]),
    "datasets": hugging_face,
    "datasets as torch": lambda: hugging_face("torch"),
    "datasets as numpy": lambda: hugging_face("numpy"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_map_style_is_a_domain(name: str) -> None:
    """Every item once an epoch, as the dataset gives it; known again when it is opened again."""
    dataset = DATASETS[name]()
    rows = own_rows({"code": dataset})["code"]
    assert ("code", 20, (20,), None) == (rows.domain, rows.num_rows, rows.shard_rows, rows.seq_len)
    assert rows.fingerprint == fingerprint(DATASETS[name]())
    mixture = DomainMixture.from_datasets({"code": dataset}, batch_rows=10, collate_fn=list)
    served = [repr(item) for _ in range(2) for item in next(mixture)]
    assert sorted(repr(dataset[i]) for i in range(20)) == sorted(served)


class Endless(IterableDataset[Any]):
    """A stream that says how long it is."""

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 20


def a_stream() -> Any:
    """A stream of Hugging Face's."""
    from datasets import IterableDataset as Stream

    return Stream.from_generator(lambda: iter(WORDS))


@pytest.mark.parametrize(
    "dataset",
    [
        *(Endless, a_stream, lambda: (word for word in WORDS), lambda: {"a": 1}, lambda: UserDict(a=1)),
        *(lambda: "text", lambda: b"text", lambda: None, lambda: 5, lambda: {1, 2}, lambda: Squares),
    ],
)
def test_what_is_not_map_style_is_refused_in_one_line(dataset: Callable[[], Any]) -> None:
    """Streams (also those that have a length), dicts, texts, classes; with the way out."""
    found = dataset()
    with pytest.raises(ConfigError, match="it must be map-style") as info:
        count_items("datasets['code']", found)
    message = str(info.value)
    assert message.startswith(f"datasets['code'] is a {type(found).__name__}; ")
    assert "ddkmix pack" in message
    assert "\n" not in message


def test_a_number_of_type_numpy_is_a_length() -> None:
    """`len` makes a plain one of it."""
    assert 20 == own_rows({"code": Squares(np.int64(20))})["code"].num_rows


@pytest.mark.parametrize("length", [-1, "many", None])
def test_a_length_that_is_none_is_refused(length: Any) -> None:
    """Whatever Python says about it, in one line."""
    with pytest.raises(ConfigError, match=r"^datasets\['code'\] has no length \((ValueError|TypeError): "):
        own_rows({"code": Squares(length)})


def test_a_dataset_without_items_is_refused() -> None:
    """As a domain without rows is."""
    with pytest.raises(DataError, match=r"domains \['math'\] have no rows; add documents or leave them out"):
        DomainMixture.from_datasets({"code": [1], "math": []}, batch_rows=2)


@pytest.mark.parametrize(("datasets", "what"), [({}, "empty"), ([[1, 2]], "a list"), (None, "a NoneType")])
def test_datasets_have_names(datasets: Any, what: str) -> None:
    """A list of datasets is no mapping of domains."""
    with pytest.raises(Exception, match=what if isinstance(datasets, dict) else "."):
        own_rows(datasets)


# --- errors of items --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        *(KeyError("text"), FileNotFoundError(2, "No such file", "a.bin"), StopIteration(), MemoryError()),
        *(RuntimeError("two\nlines"), IndexError("list index out of range"), AssertionError()),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_an_item_raises_is_one_line_with_its_name(error: Exception) -> None:
    """Also a StopIteration, which would end the stream as if all had been served."""

    class Broken:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Any:
            raise error

    with pytest.raises(DataError) as info:
        read_item("code", Broken(), 1)
    message = str(info.value)
    assert message.startswith(f"datasets['code'][1] cannot be read ({type(error).__name__}")
    assert message.endswith(").")
    assert "\n" not in message
    assert error is info.value.__cause__
    assert "__getitem__" in info.value.__notes__[0]


def test_a_table_by_columns_is_found_out_when_it_is_opened() -> None:
    """What has a length and takes names, not numbers, fails at its first item."""

    class Columns:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, name: str) -> Any:
            return {"text": ["a", "b", "c"]}[name]

    with pytest.raises(DataError, match=r"datasets\['code'\]\[0\] cannot be read \(KeyError: 0\)"):
        own_rows({"code": Columns()})


# --- fingerprints -----------------------------------------------------------------------------------


@dataclass
class Example:
    """What some datasets give."""

    text: str
    image: Any = None


class Opaque:
    """An object of which nothing is known but its type."""

    def __init__(self, value: int) -> None:
        self.value = value


KINDS: Mapping[str, Callable[[int], Any]] = {
    "int": lambda n: n,
    "float": lambda n: n / 7,
    "numpy number": lambda n: np.int64(n),
    "text": str,
    "bytes": lambda n: bytes([n]),
    "array": lambda n: np.full((2, 2), n, dtype=np.uint16),
    "objects": lambda n: np.array([[n], [n, "ragged"]], dtype=object),
    "tensor": lambda n: torch.tensor(n),
    "bfloat16": lambda n: torch.tensor(n, dtype=torch.bfloat16),
    "gradient": lambda n: torch.tensor(float(n), requires_grad=True),
    "sparse": lambda n: torch.tensor([0.0, n + 1.0]).to_sparse(),
    "float8": lambda n: torch.tensor([float(n)]).to(torch.float8_e4m3fn),
    "dict": lambda n: {"a": [n, {"b": (n,)}]},
    "dataclass": lambda n: Example(str(n)),
    "pair": lambda n: (n, None),
    "key": lambda n: {n: 1},
    "nan": lambda n: (float("nan"), n),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_is_known_by_its_items(kind: str) -> None:
    """The same items made anew are the same; one other item among those looked at, or one more, is not."""
    make = KINDS[kind]
    found = fingerprint([make(n) for n in range(8)])
    assert found == fingerprint([make(n) for n in range(8)])
    assert found != fingerprint([make(n) for n in range(7)] + [make(9)])
    assert found != fingerprint([make(n) for n in range(9)])


def test_of_opaque_objects_the_type_counts() -> None:
    """Their addresses would be others in the next process."""
    assert fingerprint([Opaque(1)] * 8) == fingerprint([Opaque(2)] * 8)
    assert fingerprint([Opaque(1)] * 8) != fingerprint([None] * 8)


class Noisy:
    """A dataset that changes some of its items at random, as augmentations do."""

    def __init__(self, draw: Callable[[], float], share: float = 0.5) -> None:
        self.draw, self.share = draw, share

    def __len__(self) -> int:
        return 50

    def __getitem__(self, i: int) -> int:
        return i + 1000 * (self.draw() < self.share)


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: float(np.random.random()), lambda: float(torch.rand(()))],  # noqa: NPY002
    ids=["random", "numpy", "torch"],
)
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_random_items_do_not_make_another_dataset(draw: Callable[[], float], share: float) -> None:
    """Whether few or many of them change, and whatever the generator has drawn before."""
    found = set()
    for seed in range(10):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        found.add(fingerprint(Noisy(draw, share)))
    assert 1 == len(found)


def test_items_from_a_generator_of_their_own_count_by_number() -> None:
    """Where two readings of an item differ, no item counts: by chance some are the same twice."""

    def noisy(seed: int, items: int = 50) -> Any:
        dataset = Noisy(random.Random(seed).random)
        dataset.__class__ = type("Noisy", (Noisy,), {"__len__": lambda _: items})
        return dataset

    assert 1 == len({fingerprint(noisy(seed)) for seed in range(3)})
    assert fingerprint(noisy(0)) != fingerprint(noisy(0, 51))


def test_looking_at_items_leaves_the_random_generators_alone() -> None:
    """A run does not change because its data were opened. (beartype moves Python's own in tests.)"""
    before = str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    fingerprint(Noisy(lambda: float(torch.rand(())) + random.random() + float(np.random.random())))  # noqa: NPY002
    assert before == (str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002


def test_few_items_are_looked_at() -> None:
    """Of a million items eight, twice each."""

    class Counted:
        asked = 0

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, i: int) -> int:
            self.asked += 1
            return i

    counted = Counted()
    mixture = DomainMixture.from_datasets({"code": counted}, batch_rows=4, collate_fn=list)
    assert 16 == counted.asked
    next(mixture)
    assert 20 == counted.asked


def test_data_that_have_changed_since_a_save_are_refused() -> None:
    """Another length or other items; the same data made anew go on."""
    state = DomainMixture.from_datasets({"code": list(WORDS)}, batch_rows=4).state_dict()
    DomainMixture.from_datasets({"code": list(WORDS)}, batch_rows=4).load_state_dict(state)
    for changed in (WORDS[:-1], [{**word, "text": "other"} for word in WORDS]):
        mixture = DomainMixture.from_datasets({"code": changed}, batch_rows=4)
        with pytest.raises(DataError, match="the data of domain 'code' changed") as info:
            mixture.load_state_dict(state)
        assert "\n" not in str(info.value)
        assert 1 == len(mixture.load_state_dict(state, allow_changes=True))


# --- sizes ------------------------------------------------------------------------------------------


def test_items_have_sizes_where_somebody_says_them() -> None:
    """Else each counts as one."""
    rows = own_rows({"code": WORDS}, num_tokens={"code": [i + 1 for i in range(20)]})["code"]
    assert [1, 20] == [rows.counted_tokens_at(0, 0), rows.counted_tokens_at(0, 19)]
    assert 1 == own_rows({"code": WORDS})["code"].counted_tokens_at(0, 19)
    assert "code#19" == rows.name_of(0, 19)


def test_other_sizes_are_another_stream() -> None:
    """Weights that count tokens serve other rows, so a saved state does not go on."""
    sizes = [2] * 20
    found = fingerprint(WORDS, num_tokens={"code": sizes})
    assert found == fingerprint(WORDS, num_tokens={"code": np.array(sizes, dtype=np.int32)})
    assert found != fingerprint(WORDS, num_tokens={"code": [3, *sizes[1:]]})
    assert found != fingerprint(WORDS)


@pytest.mark.parametrize(
    ("expected", "sizes"),
    [
        ("num_tokens['code'] has 19 entries for 20 items; it needs one number >= 1", {"code": [1] * 19}),
        ("num_tokens['code'] has 20 entries for 20 items", {"code": [1] * 19 + [0]}),
        ("num_tokens is of ['math'] and datasets of ['code']", {"math": [1] * 20}),
    ],
)
def test_sizes_that_do_not_fit_are_refused(expected: str, sizes: Any) -> None:
    """One for each item of each domain."""
    with pytest.raises(ConfigError) as info:
        own_rows({"code": WORDS}, sizes)
    assert expected in str(info.value)


def test_tokens_need_sizes() -> None:
    """Nobody guesses them."""
    with pytest.raises(ConfigError, match="count = 'tokens' of your own datasets; give num_tokens"):
        DomainMixture.from_datasets({"code": WORDS}, batch_rows=4, count="tokens")


def test_weights_count_tokens_where_sizes_are_given() -> None:
    """Items of 1 and of 9 tokens at equal weights: after every step the tokens differ by less than the bound
    of H_2 = 1.5 items of the largest size from the halves."""
    lengths = {"long": [9] * 30, "short": [1] * 30}
    mixture = DomainMixture.from_datasets(
        {"long": range(30), "short": range(30)},
        batch_rows=5,
        num_tokens=lengths,
        count="tokens",
        weights={"long": 0.5, "short": 0.5},
        collate_fn=list,
    )
    for _ in range(40):
        next(mixture)
        long, short = 9 * mixture.served["long"], mixture.served["short"]
        assert abs(long - (long + short) / 2) < 1.5 * 9
    assert mixture.served["short"] > 7 * mixture.served["long"]


@pytest.mark.parametrize(
    ("expected", "values"),
    [
        ("x must be whole numbers and holds bool; of a mask, give numpy.flatnonzero(mask).", [True, False]),
        ("x must be whole numbers and holds float64", [1.0, 2.5]),
        ("x must be whole numbers and holds <U1", ["a", "b"]),
        ("x must be whole numbers and holds object", [None, 1]),
        ("x must be whole numbers (", [[1, 2], [3]]),
    ],
)
def test_numbers_that_would_become_others_are_refused(expected: str, values: Any) -> None:
    """A mask read as zeros and ones, fractions cut off, lists of different length."""
    with pytest.raises(ConfigError) as info:
        integers("x", values)
    assert expected in str(info.value)
    assert "\n" not in str(info.value)


def test_numbers_in_any_container() -> None:
    """None at all, too."""
    for values in ([1, 2], (1, 2), range(1, 3), np.array([1, 2], dtype=np.uint8), torch.tensor([1, 2])):
        assert [1, 2] == integers("x", values).tolist()
    assert np.int64 == integers("x", []).dtype
