"""What `ddkmix plan` says before anything runs: rows, epochs, tokens, warnings, memory, all by hand."""

import json
import re
import struct

import pytest

from ddkmix.config import parse_config
from ddkmix.domains import load_domains
from ddkmix.loader import DomainMixture
from ddkmix.pack import pack_domains
from ddkmix.report.plan import render_plan
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import write_domain


@pytest.fixture
def make_plan(tmp_path, tiny_config, tiny_teacher):
    """A function that renders the plan of two small domains under given weights and sections."""
    for name, per_shard in (("code", 8), ("math", 16)):
        write_domain(tmp_path / "domains", name, per_shard=per_shard)

    def make(weights, *, teacher=tiny_teacher, **sections):
        sections = {"domains": [str(tmp_path / "domains")], "cache_dir": str(tmp_path / "cache"), **sections}
        config = parse_config(
            tiny_config(teacher={"model": str(teacher), "dtype": "bfloat16"}, **sections), where="test"
        )
        packed = pack_domains(
            load_domains(config.domains),
            read_tokenizer(str(tiny_teacher)),
            seq_len=config.pack.seq_len,
            cache_dir=config.cache_dir,
            processes=1,
        )
        mixture = DomainMixture(
            {name: domain.train for name, domain in packed.items()},
            batch_rows=config.trainer.batch_rows,
            weights=weights,
            max_epochs=config.mixture.max_epochs,
            on_cap=config.mixture.on_cap,
        )
        return render_plan(config, packed, mixture), packed

    return make


@pytest.fixture
def teacher(tmp_path):
    """A teacher of which only config and the headers of the parameters are here, as on a login node."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50_000, "num_hidden_layers": 3}))
    shapes = {
        "model.embed_tokens.weight": [50_000, 1000],  # 50 million
        **{f"model.layers.{i}.mlp.weight": [10_000, 1000] for i in range(3)},  # 10 million each
        "model.norm.weight": [1000],
    }
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            **{k: {"dtype": "BF16", "shape": v, "data_offsets": [0, 0]} for k, v in shapes.items()},
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def row_of(text, domain):
    """The cells of a domain."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [domain])


def test_rows_served_and_epochs_by_hand(make_plan):
    """10 steps x 6 rows at weights 3/4 and 1/4 are 45 and 15 rows; epochs are those over the rows."""
    text, packed = make_plan({"code": 3.0, "math": 1.0})
    for name, weight, rows in (("code", 0.75, 45), ("math", 0.25, 15)):
        train, held_out = packed[name].train, packed[name].held_out
        expected = [
            name,
            str(train.num_rows),
            f"{train.num_tokens:,}",
            str(min(held_out.num_rows, 8)),
            f"{weight:.3f}",
            str(rows),
            f"{rows / train.num_rows:.2f}",
            "-",
        ]
        assert expected == row_of(text, name)


def test_tokens_and_updates_by_hand(make_plan):
    """10 steps x 6 rows x 32 tokens; with an update every 4 steps there are 2 after the first interval."""
    text, _ = make_plan({"code": 1.0, "math": 1.0})
    expected = (
        "10 steps x 6 rows x 32 tokens = 1,920 tokens (192 a step); 2 weight updates after the first "
        "interval (4 steps each)."
    )
    assert expected in text.splitlines()


@pytest.mark.parametrize(
    ("steps", "interval", "updates"), [(10, 4, 2), (8, 4, 1), (9, 4, 2), (4, 4, 0), (3, 4, 0)]
)
def test_an_update_at_the_last_step_would_serve_nobody(make_plan, steps, interval, updates):
    """Updates happen at multiples of the interval before the end, not at the end."""
    trainer = {"steps": steps, "batch_rows": 6}
    text, _ = make_plan({"code": 1.0, "math": 1.0}, trainer=trainer, mixture={"interval_steps": interval})
    assert f"; {updates} weight updates after the first" in text


def test_held_out_rows_are_those_that_are_measured(make_plan):
    """A domain with fewer held-out rows than asked for shows what it has."""
    text, packed = make_plan({"code": 1.0, "math": 1.0}, evaluation={"rows": 10_000})
    assert str(packed["code"].held_out.num_rows) == row_of(text, "code")[3]


def test_a_domain_that_will_reach_its_limit_is_a_warning_with_the_step(make_plan):
    """A quarter of an epoch of code is served 4.5 rows a step; the step is the quotient, rows stop there."""
    text, packed = make_plan({"code": 3.0, "math": 1.0}, mixture={"max_epochs": 0.25, "on_cap": "stop"})
    rows = packed["code"].train.num_rows
    cap = rows // 4
    assert cap < 45  # or nothing would be capped
    (warning,) = [line for line in text.splitlines() if line.startswith("warning")]
    expected = f"warning: code reaches its max_epochs at step {int(cap / 4.5)}; then mixture.on_cap = 'stop'."
    assert expected == warning
    assert [f"{cap:,}", f"{cap / rows:.2f}", f"{cap / rows:g}"] == row_of(text, "code")[5:]


def test_without_a_limit_there_is_no_warning(make_plan):
    """Nothing to warn of."""
    assert "warning" not in make_plan({"code": 1.0, "math": 1.0})[0]


def test_memory_of_a_pruned_student_by_hand(make_plan, teacher):
    """80 million parameters in bf16; layers 0 and 2 kept: 70 million x 16 bytes; 8 chunks of logits."""
    text, _ = make_plan(
        {"code": 1.0, "math": 1.0},
        teacher=teacher,
        student={"init": "prune", "layers": [0, 2]},
        trainer={"logits_chunk_tokens": 100},
    )
    # 2 x 80.001e6, 16 x 70.001e6, 8 x 4 x 100 x 50,000 bytes
    expected = (
        "memory: teacher 0.16 GB (80M parameters), student 1.12 GB (70M parameters with gradients and AdamW "
        "moments, 16 bytes each), logits 0.16 GB; activations come on top."
    )
    assert expected == text.splitlines()[-1]


def test_memory_of_a_student_that_is_not_built_yet(make_plan, teacher):
    """A student from a config has no size before it is built; the rest is told."""
    student = {"init": "config", "layers": None}
    text, _ = make_plan({"code": 1.0, "math": 1.0}, teacher=teacher, student=student)
    last = text.splitlines()[-1]
    assert re.fullmatch(
        r"memory: teacher 0.16 GB, logits \d\.\d\d GB; the student's size is known only .*", last
    )


def test_without_the_teachers_parameters_there_is_no_estimate(make_plan, teacher):
    """Config here, parameters not: the plan says so and is a plan all the same."""
    (teacher / "model.safetensors").unlink()
    text, _ = make_plan({"code": 1.0, "math": 1.0}, teacher=teacher)
    assert "memory: the teacher's parameters are not on this machine yet, so no estimate." in text
