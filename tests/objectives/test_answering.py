"""From a checked config to who answers: what is missing or has no sense is one line, with the way out."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from ddkmix import answering, setup
from ddkmix.answering import Asked, open_prompts
from ddkmix.config import RunConfig
from ddkmix.errors import ConfigError, DataError, DdkmixError, ModelError
from ddkmix.objective_checks import check_processes
from ddkmix.preflight import check
from ddkmix.prepare import open_rows
from ddkmix.setup import train
from tests.conftest import save_tiny_model
from tests.objectives.conftest import OBJECTIVES_IN_RUNS
from tests.objectives.opened import STILL, open_run

MakeRun = Callable[..., RunConfig]
DPKD: dict[str, Any] = {"objective": {"name": "dpkd"}, "loss": []}
GKD: dict[str, Any] = {"objective": {"name": "gkd"}, "loss": [{"name": "jsd"}]}


def opened(config: RunConfig) -> Asked | None:
    """The prompts of a config, whose rows are packed already."""
    prepared = check(config)
    return open_prompts(prepared, open_rows(prepared, shown=False))


def refused(config: RunConfig, error: type[DdkmixError], message: str) -> None:
    """Before a model is loaded, in one line."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("build_student", "open_teaching"):
            patch.setattr(setup, name, None)  # whoever calls it fails otherwise
        with pytest.raises(error, match=message) as info:
            train(config)
    assert "\n" not in str(info.value)


def test_distillation_opens_nothing(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks nobody."""
    monkeypatch.setattr(answering, "leading_prompts", None)
    assert opened(make_run()) is None


def test_prompts_are_those_of_the_domains_that_have_some(make_run: MakeRun) -> None:
    """A store only where the teacher's responses are wanted."""
    pairs, shares = opened(make_run(**DPKD)), opened(make_run(**GKD))
    assert pairs is not None
    assert shares is not None
    assert {"talk"} == set(pairs.prompts) == set(shares.prompts)
    assert pairs.store is not None
    assert shares.store is None
    assert 8 == pairs.cards["talk"].max_new_tokens


@pytest.mark.parametrize("name", ["dpkd", "seqkd", "distillm2", "plad_margin"])
def test_a_missing_store_names_the_command(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    """`ddkmix generate`."""
    config = make_run(objective={"name": name}, generate={"folder": str(tmp_path / "nothing")})
    refused(config, DataError, r"holds no responses; make them with `ddkmix generate CONFIG --by teacher`")


def test_who_asks_only_the_student_needs_no_store(make_run: MakeRun, tmp_path: Path) -> None:
    """A run on the student's responses alone begins without one."""
    found = opened(make_run(**GKD, generate={"folder": str(tmp_path / "nothing")}))
    assert found is not None
    assert found.store is None


def test_a_store_of_other_settings_is_not_taken(make_run: MakeRun) -> None:
    """The message says which setting it is."""
    refused(make_run(**DPKD, generate={"temperature": 0.5}), DataError, r"temperature 1.0 \(wanted: 0.5\)")


def test_a_store_that_is_not_whole_is_refused(make_run: MakeRun, answered: Path, tmp_path: Path) -> None:
    """How many shards of which domain it lacks, and the command."""
    folder = tmp_path / "responses"
    shutil.copytree(answered / "responses", folder)
    next(folder.rglob("*.responses")).unlink()
    message = r"lack shards: 1 of 2 in talk. Run `ddkmix generate CONFIG --by teacher`"
    refused(make_run(**DPKD, generate={"folder": str(folder)}), DataError, message)


def test_prompts_that_leave_no_room_are_refused(make_run: MakeRun) -> None:
    """256 positions, and what would fit."""
    for sections in (DPKD, GKD):
        config = make_run(**sections, generate={"max_new_tokens": 250})
        refused(config, ConfigError, r"generate.max_new_tokens = 250 are more than the 256 positions of")


def test_a_run_without_prompts_is_refused(make_run: MakeRun, prompt_cards: Path) -> None:
    """All its domains are named."""
    config = make_run(**GKD, domains=[str(prompt_cards / "code.yaml")])
    refused(config, ConfigError, r"objective gkd learns from responses, and none of the domains code has")


def test_something_ends_a_response(make_run: MakeRun, chat_teacher: Path, tmp_path: Path) -> None:
    """A token that the tokenizer has; where it names none, the config must."""
    for sections in (DPKD, GKD):
        config = make_run(**sections, generate={"stop": ["<|im_stop|>"]})
        refused(config, ConfigError, r"'<\|im_stop\|>' is not a token of")
    endless = tmp_path / "endless"
    shutil.copytree(chat_teacher, endless)
    path = endless / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|im_end|>", ', ""))
    assert "eos_token" not in path.read_text()
    config = make_run(**GKD, teacher={"model": str(endless)}, cache_dir=str(tmp_path / "cache"))
    refused(config, ConfigError, r"generate.stop to the token that ends a response")


def test_gaps_are_nobody_s_objective(make_run: MakeRun) -> None:
    """What an objective needs to train does not stand in the way of measuring."""
    config = make_run(**DPKD, signal={"source": "store"})
    refused(config, ConfigError, "set signal.source to live")
    assert "dpkd" == check(config, only_gaps=True).config.objective.name


def test_an_ensemble_has_no_responses(make_run: MakeRun, chat_teacher: Path) -> None:
    """One model answers; an ensemble may comment on the student's responses."""
    teachers = {
        "other": {"model": str(chat_teacher), "dtype": "float32"},
        "both": {"ensemble": {"teacher": 1.0, "other": 1.0}},
    }
    config = make_run(**DPKD, teachers=teachers, default_teacher="both")
    refused(config, ConfigError, "is an ensemble, which has no responses of its own")
    assert opened(make_run(**GKD, teachers=teachers, default_teacher="both")) is not None


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_student_in_pieces_cannot_answer(make_run: MakeRun, kind: DistributedType) -> None:
    """Its parameters lie on several ranks; DDP's do not, and without an objective nobody asks it."""
    for sections in (GKD, DPKD, OBJECTIVES_IN_RUNS["seqkd"]):
        prepared = check(make_run(**sections))
        name = sections["objective"]["name"]
        with pytest.raises(
            ConfigError, match=f"objective {name} needs .* under {kind.value} .* with DDP"
        ) as info:
            check_processes(prepared.objective, prepared.config, kind)
        assert "\n" not in str(info.value)
        check_processes(prepared.objective, prepared.config, DistributedType.MULTI_CPU)
    prepared = check(make_run())
    check_processes(prepared.objective, prepared.config, kind)


def test_a_student_in_pieces_is_refused_before_rows_are_packed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is paid for a run that cannot be."""
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_main_process=True)
    monkeypatch.setattr(setup, "open_accelerator", lambda config: accelerator)
    monkeypatch.setattr(setup, "open_rows", None)  # whoever calls it fails otherwise
    refused(make_run(**GKD), ConfigError, "objective gkd needs the whole student")


def test_what_no_model_is_needed_for_is_found_by_lint(make_run: MakeRun) -> None:
    """Before rows are packed."""
    for sections, message in (
        ({"generate": {"stop": ["<nonsense>"]}}, "'<nonsense>' is not a token"),
        ({"generate": {"max_new_tokens": 256}}, "max_new_tokens = 256 with the 256 positions of the"),
    ):
        for objective in (GKD, DPKD):
            with pytest.raises(ConfigError, match=message):
                check(make_run(**objective, **sections))
        check(make_run(**sections))  # nobody answers


def test_the_student_is_proved_before_the_first_step(make_run: MakeRun) -> None:
    """DistiLLM's first response may be hours away; the setting that is named is that of rollouts."""
    run = open_run(make_run(**OBJECTIVES_IN_RUNS["distillm"]))
    assert run.answers is not None
    assert run.answers.decoder is not None
    assert run.answers.decoder._proved
    assert "rollouts" == run.answers.decoder._section


def test_a_policy_gradient_weighs_what_is_drawn(make_run: MakeRun) -> None:
    """Padding of the vocabulary is never drawn, so it has no share of the probabilities either."""
    run = open_run(make_run(**OBJECTIVES_IN_RUNS["minillm"]))
    prepared = check(run.config)
    assert run.answers is not None
    assert run.answers.decoder is not None
    classes = prepared.tokenizer.vocab_size
    assert classes == prepared.vocab_size == run.answers.decoder._num_classes
    model = run.accelerator.unwrap_model(run.student)
    assert classes < model.student.config.vocab_size
    assert check(make_run(**DPKD)).vocab_size is None


def test_what_ends_a_response_in_any_domain_ends_the_students(make_run: MakeRun) -> None:
    """A chat's turn and the end of a plain text are different tokens, and the decoder is one."""
    run = open_run(make_run(**GKD))
    assert run.answers is not None
    asked = opened(run.config)
    assert asked is not None
    card = asked.cards["talk"]
    ends = (*card.stop_ids, 7)
    more = replace(asked, cards={"other": card, "talk": replace(card, stop_ids=ends)})
    prepared = check(run.config)
    student = run.accelerator.unwrap_model(run.student).student
    packed = open_rows(prepared, shown=False)
    answers = answering.open_answers(prepared, packed, more, student, run.teacher, run.accelerator)
    assert answers.decoder is not None
    assert set(ends) == answers.stop_ids == answers.decoder._stop
    assert set(ends) <= answers.silent["talk"]


def test_what_ends_or_pads_a_text_says_nothing(make_run: MakeRun) -> None:
    """The tokens of `Answers.silent`; responses are no longer than those of `generate`."""
    run = open_run(make_run(**GKD))
    assert run.answers is not None
    assert {"talk": frozenset({301, run.answers.padding_id})} == dict(run.answers.silent)
    assert frozenset({301}) == run.answers.stop_ids
    assert ("code", "talk") == tuple(run.answers.domains) == run.mixture.domains
    assert [False, True] == [run.answers.has_prompts(domain) for domain in (0, 1)]


def test_a_student_that_only_pads_ends_the_run(
    make_run: MakeRun, chat_tokenizer_folder: Path, tmp_path: Path
) -> None:
    """After 64 responses without a word, in one line; what was trained until then is not lost."""
    import torch
    from safetensors.torch import load_file, save_file

    mute = save_tiny_model(
        tmp_path / "mute", chat_tokenizer_folder, num_hidden_layers=1, tie_word_embeddings=False
    )
    weights = load_file(mute / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    weights["model.norm.weight"].zero_()
    save_file(weights, mute / "model.safetensors", metadata={"format": "pt"})
    config = make_run(
        objective={"name": "gkd", "share": 1.0},
        loss=[{"name": "jsd"}],
        student={"init": "load", "model": str(mute), "overrides": {}},
        rollouts={"temperature": 0.0},  # the first of equal ones, <|endoftext|>, which pads
        policy={"name": "static", "weights": {"code": 0.2, "talk": 0.8}},
        mixture={"interval_steps": 10},
        optimizer=STILL,
        trainer={"steps": 4, "batch_rows": 40, "checkpoint_steps": 1},
    )
    with pytest.raises(ModelError, match=r"step 2: the student's last 64 responses are nothing but") as info:
        train(config)
    assert "\n" not in str(info.value)
    assert (config.run_dir / "checkpoints" / "step-000001").exists()
