"""The stage: files are those of one undisturbed process, whoever writes them and however often it dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM

from ddkmix import generate as generate_module
from ddkmix.config import RunConfig, dump_config, parse_config
from ddkmix.errors import ConfigError, DataError, ModelError
from ddkmix.generate import generate, open_generating
from ddkmix.generation.sampling import Sampling
from ddkmix.index import DomainRows
from ddkmix.logits_store.sidecar import SidecarWriter
from ddkmix.models import build_student
from ddkmix.pack import Part
from ddkmix.responders import By
from ddkmix.response_store.prompts import LeadingTokens, PromptRows
from ddkmix.response_store.reader import ResponseStore
from tests.conftest import REPO, ConfigTree, save_tiny_model, write_domain
from tests.generation.models import Prompt, one_by_one

Make = Callable[..., RunConfig]


def prompts_of(rows: DomainRows) -> PromptRows | None:
    """From one token to half a row, different from row to row; math is plain text."""
    if rows.domain == "math":
        return None
    halves = [np.maximum(shard.num_tokens // 2, 1) for shard in rows.shards]
    return LeadingTokens(rows, [1 + np.arange(len(half)) % half for half in halves])


@pytest.fixture
def make(tmp_path: Path, tiny_config: Callable[..., ConfigTree]) -> Make:
    """A config of one domain with prompts, whose store is its own."""
    domains = tmp_path / "domains"
    write_domain(domains, "code", shards=2, per_shard=4)

    def config(folder: str = "responses", **sections: Any) -> RunConfig:
        options = {
            "max_new_tokens": 12,
            "block_rows": 4,
            "batch_rows": 5,
            "folder": str(tmp_path / folder),
            **sections.pop("generate", {}),
        }
        tree = tiny_config(
            domains=[str(domains)], cache_dir=str(tmp_path / "cache"), generate=options, **sections
        )
        return parse_config(tree, where="test")

    return config


def files(config: RunConfig) -> dict[str, bytes]:
    """Name and content of every file of responses."""
    assert config.generate.folder is not None
    return {path.name: path.read_bytes() for path in config.generate.folder.rglob("*.responses")}


def run(config: RunConfig, by: By = "teacher", **options: Any) -> Any:
    """The stage."""
    return generate(config, by, prompts_of=prompts_of, **options)


@pytest.mark.parametrize("by", ["teacher", "student"])
def test_stored_responses_are_those_of_the_model(make: Make, by: By) -> None:
    """Row by row as whole forward passes give them, with the random numbers of seed, model, shard and row."""
    config = make(teacher={"dtype": "float32"})
    totals = run(config, by)
    job = open_generating(config, by, prompts_of)
    model = AutoModelForCausalLM.from_pretrained(config.teacher.model)
    model = (model if by == "teacher" else build_student(config.student, config.teacher, seed=0)).eval()
    prompts, card = job.prompts["code"], job.cards["code"]
    store = ResponseStore.open(config.generate.folder, job.cards, job.prompts)
    lengths = []
    for number, shard in enumerate(prompts.shards):
        for row in range(shard.num_rows):
            key = (config.generate.seed, card.model, shard.sha256, row)
            prompt = Prompt(ids=prompts.read(number, [row])[0], key=key, name="")
            response = store.read(("code", number, row))
            expected = one_by_one(
                model, prompt, Sampling(), max_new_tokens=12, stop_ids=[0], num_classes=card.num_classes
            )
            assert expected == response.ids.tolist()
            assert response.ended == (response.ids[-1] == 0)
            lengths.append(len(response.ids))
    assert (len(lengths), sum(lengths)) == (totals["code"].rows, totals["code"].tokens)
    assert 0 < totals["code"].ended < len(lengths) or max(lengths) == 12


def test_teacher_and_student_have_stores_of_their_own(make: Make) -> None:
    """Side by side in one folder."""
    config = make()
    run(config, "teacher")
    before = len(list(config.generate.folder.iterdir()))
    run(config, "student")
    assert (1, 2) == (before, len(list(config.generate.folder.iterdir())))
    assert not {"teacher"} ^ {job.by for job in [open_generating(config, "teacher", prompts_of)]}


@pytest.mark.parametrize("batch_rows", [1, 3, 1000])
def test_responses_are_the_same_for_any_batch_size(make: Make, batch_rows: int) -> None:
    """Byte for byte, in one store: batch_rows is not a part of what a store is."""
    first, second = make("first"), make("second", generate={"batch_rows": batch_rows})
    run(first), run(second)
    assert files(first) == files(second)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_stage_that_was_interrupted_ends_with_the_same_bytes(
    make: Make, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any row: nothing is lost, doubled or drawn differently; and with another batch size it may go on."""
    whole, config = make("whole"), make()
    run(whole)
    append = SidecarWriter.append

    def dies(self: SidecarWriter, record: bytes) -> None:
        if self.num_rows == rows:
            raise KeyboardInterrupt
        append(self, record)

    monkeypatch.setattr(SidecarWriter, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    assert {} == files(config)
    run(make(generate={"batch_rows": 2}))
    assert files(whole) == files(config)
    assert not [*config.generate.folder.rglob("*.partial"), *config.generate.folder.rglob("*.journal")]


def test_nothing_is_generated_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second time no model is loaded, and the report is the same; a file that was cut is made again."""
    config = make()
    first = run(config)
    monkeypatch.setattr(generate_module, "load_responder", None)
    assert first == run(config)
    monkeypatch.undo()
    before = files(config)
    (cut, *_) = config.generate.folder.rglob("*.responses")
    os.truncate(cut, 5000)
    run(config)
    assert before == files(config)


def test_parts_make_one_store(make: Make) -> None:
    """Any machine may take any part."""
    whole, parts = make("whole"), make("parts")
    run(whole)
    assert 1 == len(files(parts) if run(parts, part=Part(number=2, of=2)) else {})
    run(parts, part=Part(number=1, of=2))
    assert files(whole) == files(parts)


def test_a_domain_of_plain_text_is_left_alone(make: Make, tmp_path: Path) -> None:
    """Only prompts are answered; where there are none at all, that is one line."""
    write_domain(tmp_path / "domains", "math", shards=1, per_shard=4)
    assert ["code"] == list(run(make()))
    with pytest.raises(ConfigError, match="none of the domains code, math has prompts"):
        generate(make(), "teacher", prompts_of=lambda rows: None)


# --- what is refused ------------------------------------------------------------------------------------


def test_empty_prompts_are_refused_before_a_model_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first of them and how many there are."""
    monkeypatch.setattr(generate_module, "load_responder", None)

    def empty(rows: DomainRows) -> PromptRows:
        return LeadingTokens(rows, [np.arange(shard.num_rows) % 2 for shard in rows.shards])

    with pytest.raises(DataError, match=r"code/train-000000\S*#0: the prompt is empty, as are \d+ of \d+ in"):
        generate(make(), "teacher", prompts_of=empty)


def test_prompts_without_room_for_a_response_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's positions, the longest prompt, and what would fit."""
    monkeypatch.setattr(generate_module, "load_responder", None)
    with pytest.raises(
        ConfigError, match=r"a prompt of 16 tokens and generate.max_new_tokens = 241 are more "
    ):
        run(make(generate={"max_new_tokens": 241}))
    with pytest.raises(ConfigError, match=r"than the 256 positions of the student; set it to at most 240"):
        run(make(generate={"max_new_tokens": 241}), "student")


def test_a_model_that_ends_at_once_in_every_row_is_refused(make: Make, tmp_path: Path) -> None:
    """Every token ends a response and pads a row: nothing was said, which would train nothing. What was made
    is kept, and says the same again."""
    import torch
    from safetensors.torch import load_file, save_file

    mute = save_tiny_model(tmp_path / "mute", Path(make().teacher.model), tie_word_embeddings=False)
    weights = load_file(mute / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    weights["model.norm.weight"].zero_()
    save_file(weights, mute / "model.safetensors", metadata={"format": "pt"})
    config = make(
        teacher={"model": str(mute)}, generate={"temperature": 0.0}
    )  # the first of equal ones: <eos>
    for _ in range(2):
        with pytest.raises(ModelError, match=r"the teacher says nothing: all \d+ responses are nothing but"):
            run(config)


def test_stop_tokens_are_those_of_the_config(make: Make) -> None:
    """By name; one that is no token is refused before anything is computed."""
    plain, named = make(), make(generate={"stop": ["<|endoftext|>"]})
    cards = [open_generating(config, "teacher", prompts_of).cards["code"] for config in (plain, named)]
    assert cards[0] == cards[1]
    assert (0,) == cards[0].stop_ids
    with pytest.raises(
        ConfigError, match=r"generate.stop = \['<\|im_end\|>'\]: '<\|im_end\|>' is not a token"
    ):
        run(make(generate={"stop": ["<|im_end|>"]}))


def test_who_answers_is_known_by_its_parameters(make: Make, tmp_path: Path) -> None:
    """Not by folders: a copy is the same; other parameters, layers, seeds and types are others."""

    def key(by: By, **sections: Any) -> str:
        return open_generating(make(**sections), by, prompts_of).cards["code"].key

    teacher = Path(make().teacher.model)
    copy = save_tiny_model(tmp_path / "copy", teacher)
    other = save_tiny_model(tmp_path / "other", teacher, seed=5)
    assert key("teacher") == key("teacher", teacher={"model": str(copy)}) != key("student")
    keys = [
        key("teacher"),
        key("teacher", teacher={"model": str(other)}),
        key("teacher", teacher={"dtype": "bfloat16"}),
        key("student"),
        key("student", student={"layers": [1]}),
        key("student", student={"init": "load", "model": str(other)}),
        key("student", student={"init": "config", "overrides": {"num_hidden_layers": 1}}),
        key("student", student={"init": "config", "overrides": {"num_hidden_layers": 1}}, seed=1),
        key("teacher", generate={"seed": 1}),
    ]
    assert len(keys) == len(set(keys))


def test_an_ensemble_and_another_vocabulary_have_no_responses(make: Make, other_teacher: Path) -> None:
    """One line each."""
    ensemble = make(
        teachers={
            "second": {"model": make().teacher.model},
            "both": {"ensemble": {"teacher": 1, "second": 1}},
        },
        default_teacher="both",
    )
    with pytest.raises(ConfigError, match="the teacher 'both' is an ensemble, which has no responses of its"):
        run(ensemble)
    student = {"init": "load", "model": str(other_teacher), "layers": None}
    foreign = make(student=student, loss=[{"name": "uld"}], pack={"seq_len": 32})
    with pytest.raises(ConfigError, match="student and teacher have different tokenizers"):
        run(foreign)


# --- ranks and kills ------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
from ddkmix.config import load_config
from ddkmix.generate import generate
from tests.test_generate import prompts_of
generate(load_config(Path(sys.argv[1])), "teacher", prompts_of=prompts_of)
"""


def test_two_ranks_write_the_files_of_one_and_a_kill_costs_nothing(make: Make, tmp_path: Path) -> None:
    """Killed with SIGKILL in the middle of a shard, then finished by two ranks: the bytes of one undisturbed
    process, no row lost or doubled, no leftovers."""
    settings = {"batch_rows": 1, "max_new_tokens": 60}
    whole, config = make("whole", generate=settings), make(generate=settings)
    run(whole)
    path, program = tmp_path / "config.yaml", tmp_path / "program.py"
    path.write_text(yaml.safe_dump(dump_config(config)))
    program.write_text(PROGRAM)
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    victim = subprocess.Popen([sys.executable, str(program), str(path)], env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and victim.poll() is None:
        journals = list(config.generate.folder.rglob("*.journal"))
        if journals and max(journal.stat().st_size for journal in journals) >= 3 * 16:
            break
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert -signal.SIGKILL == victim.wait()
    assert files(config) != files(whole)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [sys.executable, *launch, str(REPO / "tests" / "rank_program.py"), str(program), str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert 0 == done.returncode, done.stderr[-3000:]
    assert files(whole) == files(config)
    assert not list(config.generate.folder.rglob("*.journal"))
