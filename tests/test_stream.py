"""What shapes a stream: order of domains, limits, natural weights, what a saved state must agree with."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ddkmix.errors import ConfigError, DataError
from ddkmix.index import DomainRows
from ddkmix.order import locate
from ddkmix.planner import StepPlan
from ddkmix.stream import Stream, describe_stream
from tests.hand_made import unread_rows

CODE = unread_rows("code", [[3, 8, 5], [], [1, 2]], fingerprint="c")
MATH = unread_rows("math", [[8] * 10], fingerprint="m")
PROSE = unread_rows("prose", [[4] * 5], fingerprint="p")


def stream_of(rows: Sequence[DomainRows] = (CODE, MATH, PROSE), **options: Any) -> Stream:
    """A stream with batches of four rows."""
    return describe_stream(rows, **{"batch_rows": 4, **options})


def test_domains_are_sorted_by_name() -> None:
    """In whatever order they come, everything about them has one place."""
    expected = stream_of()
    for rows in ((PROSE, CODE, MATH), (MATH, PROSE, CODE)):
        stream = stream_of(rows)
        assert ("code", "math", "prose") == stream.settings.domains
        assert ["code", "math", "prose"] == [domain.domain for domain in stream.rows]
        assert ["code", "math", "prose"] == [order.domain for order in stream.orders]
        assert (5, 10, 5) == stream.settings.num_rows
        assert expected.identity == stream.identity


def test_orders_know_seed_block_and_shards() -> None:
    """Shards without rows keep their place."""
    order = stream_of(seed=3, block_rows=7).orders[0]
    assert (3, 7, (3, 0, 2)) == (order.seed, order.block_rows, order.shard_rows)


def test_a_row_has_the_size_of_its_text() -> None:
    """Where weights count tokens, without padding, in every epoch; for rows, nothing is asked."""
    stream = stream_of(count="tokens")
    tokens_of = stream.tokens_of
    assert tokens_of is not None
    for j in range(15):
        shard, row = locate(stream.orders[0], j)
        assert int(CODE.shards[shard].num_tokens[row]) == tokens_of(0, j)
    assert 3 * (3 + 8 + 5 + 1 + 2) == sum(tokens_of(0, j) for j in range(15))
    assert {8} == {tokens_of(1, j) for j in range(20)}
    assert stream_of(count="rows").tokens_of is None


def test_rows_have_the_names_of_their_places() -> None:
    """In slot order."""
    stream = stream_of()
    plan = StepPlan(step=0, version=0, domain_ids=np.array([0, 0, 2]), row_numbers=np.array([4, 7, 1]))
    expected = [
        stream.rows[domain].name_of(*locate(stream.orders[domain], j))
        for domain, j in ((0, 4), (0, 7), (2, 1))
    ]
    assert expected == stream.row_names(plan)
    assert expected[0].startswith("code/code-")


def test_natural_weights_are_rows_or_priors() -> None:
    """Priors count only where every card has one."""
    assert [0.25, 0.5, 0.25] == stream_of().natural_weights.tolist()
    priors = [
        replace(domain, prior=prior)
        for domain, prior in zip((CODE, MATH, PROSE), (2.0, 1.0, 1.0), strict=True)
    ]
    assert [0.5, 0.25, 0.25] == stream_of(priors).natural_weights.tolist()
    assert [0.25, 0.5, 0.25] == stream_of([CODE, *priors[1:]]).natural_weights.tolist()


def test_the_smaller_limit_caps_a_domain() -> None:
    """The card's or the run's, rounded down to whole rows; None where there is neither."""
    rows = (replace(CODE, max_epochs=1.5), replace(MATH, max_epochs=9.0), PROSE)
    assert (7, 90, None) == stream_of(rows).settings.cap_rows
    assert (7, 20, 10) == stream_of(rows, max_epochs=2.0).settings.cap_rows
    assert (2, 5, 2) == stream_of(rows, max_epochs=0.5).settings.cap_rows


# --- what a saved state must agree with -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({"batch_rows"}, {"batch_rows": 8}),
        ({"seed"}, {"seed": 1}),
        ({"block_rows"}, {"block_rows": 9}),
        ({"count"}, {"count": "tokens"}),
        ({"on_cap"}, {"on_cap": "stop"}),
        ({"cap_rows"}, {"max_epochs": 3.0}),
        (set(), {}),
    ],
)
def test_the_identity_has_every_setting(changed: set[str], options: dict[str, Any]) -> None:
    """Each argument that changes which rows come is in it, and changes nothing else there."""
    before, after = stream_of().identity, stream_of(**options).identity
    assert changed == {name for name in before.settings if before.settings[name] != after.settings[name]}
    assert before.data == after.data


def test_every_argument_is_in_the_identity() -> None:
    """A new argument of `describe_stream` must be thought of here."""
    arguments = set(inspect.signature(describe_stream).parameters) - {"rows", "max_epochs"}
    assert arguments | {"cap_rows"} == set(stream_of().identity.settings)


def test_the_identity_has_the_data() -> None:
    """By name; limits are told by the domain, so that another domain's coming does not change them."""
    identity = stream_of([CODE, replace(MATH, max_epochs=2.0)]).identity
    assert {"code": "c", "math": "m"} == dict(identity.data)
    assert {"math": 20} == identity.settings["cap_rows"]
    assert {"code": 0} == stream_of([CODE], max_epochs=0.1).identity.settings["cap_rows"]


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected", "rows", "options"),
    [
        (ConfigError, "batch_rows = 0,", (CODE,), {"batch_rows": 0}),
        (ConfigError, "block_rows = 0,", (CODE,), {"block_rows": 0}),
        (ConfigError, "max_epochs = 0.0; ", (CODE,), {"max_epochs": 0.0}),
        (ConfigError, "max_epochs = -1.0; ", (CODE,), {"max_epochs": -1.0}),
        (ConfigError, "max_epochs = nan; ", (CODE,), {"max_epochs": math.nan}),
        (ConfigError, "max_epochs = inf; ", (CODE,), {"max_epochs": math.inf}),
        (DataError, "domains ['code', 'code'] are not distinct", (CODE, CODE), {}),
        (DataError, "domains ['web'] have no rows", (CODE, unread_rows("web", [[], []])), {}),
        (
            DataError,
            "seq_len by domain: {'code': 8, 'long': 16}",
            (CODE, unread_rows("long", [[1]], seq_len=16)),
            {},
        ),
        (DataError, "domains must have rows of one length", (), {}),
    ],
)
def test_what_makes_no_stream_is_refused(
    kind: type[Exception], expected: str, rows: Sequence[DomainRows], options: dict[str, Any]
) -> None:
    """In one line with the value."""
    with pytest.raises(kind) as info:
        stream_of(rows, **options)
    assert expected in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("options", [{"count": "bytes"}, {"on_cap": "renormalise"}])
def test_unknown_words_are_refused(options: dict[str, Any]) -> None:
    """Without the type checks of these tests, as users call it: no word is taken for another."""
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=rf"{name} = '{value}'"):
        inspect.unwrap(describe_stream)([CODE], batch_rows=4, **options)
