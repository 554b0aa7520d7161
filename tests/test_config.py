"""The config tree: its defaults, its rules, their one-line messages, overrides and the way back to YAML."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ddkmix.config import OnlineModules, RunConfig, dump_config, load_config, parse_config, parse_overrides
from ddkmix.errors import ConfigError
from ddkmix.losses import build_terms
from ddkmix.objectives import GKD, Distill, build_objective
from ddkmix.policies import build_policy, guarded
from ddkmix.policies.ddk import Ddk

SMALLEST = {
    "run_dir": "runs/x",
    "domains": ["domains"],
    "teacher": {"model": "teacher"},
    "student": {"init": "prune", "layers": [0, 2]},
    "trainer": {"steps": 100},
}


def parse(*overrides: str, **sections: Any) -> RunConfig:
    """The smallest config with sections replaced and overrides on top."""
    return parse_overrides({**copy.deepcopy(SMALLEST), **sections}, overrides, where="c.yaml")


def message_of(*overrides: str, **sections: Any) -> str:
    """The message of a config that is wrong."""
    with pytest.raises(ConfigError) as error:
        parse(*overrides, **sections)
    assert "\n" not in str(error.value)
    return str(error.value)


def sections_of(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, type[BaseModel]]]:
    """Every section of the tree with its dotted prefix: ("", RunConfig), ("teacher.", Teacher), ..."""
    found = [(prefix, model)]
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if (
            isinstance(annotation, type)
            and issubclass(annotation, BaseModel)
            and name not in ("policy", "objective")
        ):
            found += sections_of(annotation, f"{prefix}{name}.")
    return found


# --- defaults ---------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_ddk():
    """What is left out is what the paper used, where it says: arXiv 2407.16154, sections 3 and 4."""
    config = parse()
    expected = {
        "mixture.interval_steps": 1000,
        "evaluation.rows": 500,
        "optimizer.lr": 3e-5,
        "schedule.name": "cosine",
        "schedule.final_ratio": 0.1,
        "policy.name": "ddk",
        "mixture.max_epochs": None,
        "mixture.on_cap": "renormalize",
    }
    actual = {}
    for key in expected:
        section, name = key.split(".")
        actual[key] = getattr(getattr(config, section), name)
    assert expected == actual


def test_the_default_objective_is_ddks():
    """Cross-entropy + 0.2 x KL(teacher || student) at temperature 1."""
    terms = build_terms(parse().loss)
    assert [("cross_entropy", 1.0), ("forward_kl", 0.2)] == [(term.name, term.weight) for term in terms]
    assert 1.0 == terms[1].loss.temperature


def test_the_default_policy_is_ddk_with_alpha_one_half():
    """uniform_mix = 1 - alpha = 0.5, with the perplexity ratio as signal and a random first interval."""
    policy = build_policy(parse().policy)
    assert Ddk(uniform_mix=0.5, signal="perplexity_ratio", first_interval="random") == policy


@pytest.mark.parametrize(
    "text", ["guards: off", "guards: 'off'", "guards: false", "guards: {floor: 0, cap: 1, evidence: 0}"]
)
def test_ddk_as_published_is_one_line(tmp_path, text):
    """YAML reads `off` as a boolean; from a file, from an override, and back from the dumped config."""
    path = write(tmp_path, yaml.safe_dump(SMALLEST) + text + "\n")
    off = {"floor": 0.0, "cap": 1.0, "max_move": 1.0, "warmup_intervals": 0, "evidence": 0.0}
    config = load_config(path)
    assert off == config.guards.model_dump()
    assert config.guards == parse("guards=off").guards
    assert Ddk() == guarded(build_policy(config.policy), config.guards)
    assert config == parse_config(dump_config(config), where="x")


@pytest.mark.parametrize("text", ["guards=on", "guards=true", "guards={}", "guards='on'"])
def test_guards_that_are_on_are_the_default(text):
    """Floor and cap by the number of domains, one standard error of evidence, no other limit."""
    assert parse().guards == parse(text).guards
    expected = {"floor": None, "cap": None, "max_move": 1.0, "warmup_intervals": 0, "evidence": 1.0}
    assert expected == parse().guards.model_dump()


def test_five_keys_are_enough():
    """Only where to write, what to read, whom to learn from, what to train and for how long."""
    for key in SMALLEST:
        tree = {name: value for name, value in SMALLEST.items() if name != key}
        with pytest.raises(ConfigError, match=rf"^{key} is missing in c.yaml; it has no default.$"):
            parse_config(tree, where="c.yaml")


def test_a_config_cannot_be_changed():
    """Frozen all the way down: what was checked is what runs."""
    config = parse()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValueError, match="frozen"):
        config.trainer.steps = 1


def test_every_field_says_what_it_is():
    """Reading the tree tells what a run can be told: sections are documented, and nearly all fields."""
    for _, model in sections_of():
        assert model.__doc__
    undocumented = {
        f"{prefix}{name}"
        for prefix, model in sections_of()
        for name, field in model.model_fields.items()
        if not field.description
    }
    plain = {"beta1", "beta2", "eps", "project"}
    names = {"teacher", "student", "trainer", "pack", "mixture", "policy", "optimizer", "schedule", "loader"}
    assert {name.split(".")[-1] for name in undocumented} <= plain | names | {
        "evaluation",
        "storage",
        "tracking",
    }


# --- rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.steps=0", "trainer.steps = 0 in c.yaml; input should be greater than or equal to 1."),
        (
            "trainer.steps=ten",
            "trainer.steps = 'ten' in c.yaml; input should be a valid integer, unable to parse string as an "
            "integer.",
        ),
        ("trainer.steps=1.5", "trainer.steps = 1.5 in c.yaml; input should be a valid integer"),
        ("trainer.batch_rows=0", "trainer.batch_rows = 0 in c.yaml; input should be greater"),
        ("trainer.microbatch_rows=0", "trainer.microbatch_rows = 0 in c.yaml; input should be greater"),
        ("trainer.mixed_precision=fp8", "trainer.mixed_precision = 'fp8' in c.yaml; input should be 'no' or"),
        ("trainer.logits_chunk_tokens=0", "trainer.logits_chunk_tokens = 0 in c.yaml; input should be"),
        ("trainer.checkpoint_steps=0", "trainer.checkpoint_steps = 0 in c.yaml; input should be greater"),
        ("trainer.keep_checkpoints=0", "trainer.keep_checkpoints = 0 in c.yaml; input should be greater"),
        ("trainer.log_steps=0", "trainer.log_steps = 0 in c.yaml; input should be greater"),
        ("mixture.interval_steps=0", "mixture.interval_steps = 0 in c.yaml; input should be greater"),
        (
            "guards=maybe",
            "guards = 'maybe' in c.yaml; it must be a section of settings, as in {name: value}.",
        ),
        ("guards=null", "guards = None in c.yaml; it must be a section of settings, as in {name: value}."),
        ("guards.floor=1.1", "guards.floor = 1.1 in c.yaml; input should be less than or equal to 1."),
        ("guards.cap=0", "guards.cap = 0 in c.yaml; input should be greater than 0."),
        ("guards.max_move=0", "guards.max_move = 0 in c.yaml; input should be greater than 0."),
        ("guards.warmup_intervals=-1", "guards.warmup_intervals = -1 in c.yaml; input should be greater"),
        ("guards.evidence=.inf", "guards.evidence = inf in c.yaml; input should be a finite number."),
        (
            "guards={floor: 0.5, cap: 0.2}",
            "guards: floor = 0.5 is above cap = 0.2; lower it or raise the cap",
        ),
        ("mixture.max_epochs=0", "mixture.max_epochs = 0 in c.yaml; input should be greater than 0."),
        ("mixture.max_epochs=.inf", "mixture.max_epochs = inf in c.yaml; input should be a finite number."),
        (
            "mixture.on_cap=wrap",
            "mixture.on_cap = 'wrap' in c.yaml; input should be 'renormalize', 'stop' or",
        ),
        ("mixture.block_rows=0", "mixture.block_rows = 0 in c.yaml; input should be greater"),
        ("pack.seq_len=1", "pack.seq_len = 1 in c.yaml; input should be greater than or equal to 2."),
        ("pack.processes=-1", "pack.processes = -1 in c.yaml; input should be greater than or equal to 0."),
        ("optimizer.lr=0", "optimizer.lr = 0 in c.yaml; input should be greater than 0."),
        ("optimizer.lr=.nan", "optimizer.lr = nan in c.yaml; input should be a finite number."),
        ("optimizer.beta1=1", "optimizer.beta1 = 1 in c.yaml; input should be less than 1."),
        ("optimizer.beta2=-0.1", "optimizer.beta2 = -0.1 in c.yaml; input should be greater than or equal"),
        ("optimizer.eps=0", "optimizer.eps = 0 in c.yaml; input should be greater than 0."),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay = -1 in c.yaml; input should be greater"),
        ("optimizer.max_grad_norm=-1", "optimizer.max_grad_norm = -1 in c.yaml; input should be greater"),
        ("schedule.name=linear", "schedule.name = 'linear' in c.yaml; input should be 'cosine', 'wsd' or"),
        ("schedule.final_ratio=1.1", "schedule.final_ratio = 1.1 in c.yaml; input should be less than or"),
        ("schedule.final_ratio=.nan", "schedule.final_ratio = nan in c.yaml; input should be"),
        (
            "schedule.warmup_steps=101",
            "schedule.warmup_steps = 101 is more than trainer.steps = 100; warm up for less or train for "
            "longer (in c.yaml).",
        ),
        (
            "schedule.name=wsd",
            "schedule.name = 'wsd' needs schedule.decay_steps >= 1 or decay_share > 0 (in c.yaml).",
        ),
        (
            "schedule={warmup_steps: 3, warmup_share: 0.1}",
            "schedule: warmup_steps = 3 and warmup_share = 0.1 both say how long the warmup is; remove one "
            "(in c.yaml).",
        ),
        (
            "schedule={name: wsd, decay_steps: 3, decay_share: 0.1}",
            "schedule: decay_steps = 3 and decay_share = 0.1 both say how long the decay is; remove one",
        ),
        ("schedule.warmup_share=1.1", "schedule.warmup_share = 1.1 in c.yaml; input should be less than or"),
        ("schedule.decay=sqr", "schedule.decay = 'sqr' in c.yaml; input should be 'cosine', 'linear' or"),
        (
            "schedule.decay=sqrt",
            "schedule.decay = 'sqrt' has no effect with schedule.name = 'cosine'; remove",
        ),
        (
            "schedule.decay_share=0.1",
            "schedule.decay_share = 0.1 has no effect with schedule.name = 'cosine'",
        ),
        (
            "schedule.decay_steps=10",
            "schedule.decay_steps = 10 has no effect with schedule.name = 'cosine'; remove it or use 'wsd' "
            "(in c.yaml).",
        ),
        ("loader.workers=-1", "loader.workers = -1 in c.yaml; input should be greater than or equal to 0."),
        ("loader.prefetch_steps=0", "loader.prefetch_steps = 0 in c.yaml; input should be greater"),
        ("evaluation.rows=0", "evaluation.rows = 0 in c.yaml; input should be greater than or equal to 1."),
        ("evaluation.batch_rows=0", "evaluation.batch_rows = 0 in c.yaml; input should be greater"),
        ("teacher.dtype=int8", "teacher.dtype = 'int8' in c.yaml; input should be 'float32', 'bfloat16' or"),
        ("teacher.model=null", "teacher.model = None in c.yaml; input should be a valid string."),
        (
            "student.init=copy",
            "student.init = 'copy' in c.yaml; input should be 'prune', 'config' or 'load'.",
        ),
        (
            "student.layers=null",
            "student: init = 'prune' needs `layers`, the teacher layers to keep (in c.yaml).",
        ),
        ("student.layers=[]", "student: init = 'prune' needs `layers`, the teacher layers to keep"),
        ("student.layers=[2, 0]", "student: layers = [2, 0] must increase without repeats (in c.yaml)."),
        ("student.layers=[0, 0]", "student: layers = [0, 0] must increase without repeats (in c.yaml)."),
        ("student.layers=[-1]", "student.layers.0 = -1 in c.yaml; input should be greater than or equal"),
        (
            "student.init=load",
            "student: init = 'load' needs `model`, a local folder or a Hub id (in c.yaml).",
        ),
        ("seed=-1", "seed = -1 in c.yaml; input should be greater than or equal to 0."),
        ("seed=4294967296", "seed = 4294967296 in c.yaml; input should be less than 4294967296."),
        ("domains=[]", "domains = [] in c.yaml; tuple should have at least 1 item"),
        ("domains=code", "domains = 'code' in c.yaml; it must be a list: [code]."),
        ("tracking.trackers=wandb", "tracking.trackers = 'wandb' in c.yaml; it must be a list: [wandb]."),
        ("loss={name: uld}", "loss = {'name': 'uld'} in c.yaml; it must be a list."),
        ("trainer=20", "trainer = 20 in c.yaml; it must be a section of settings"),
        ("policy=ddk", "policy = 'ddk' in c.yaml; it must be a section of settings"),
        ("policy={}", "policy.name is missing in c.yaml; it has no default."),
        ("loss=[{weight: 1}]", "loss.0.name is missing in c.yaml; it has no default."),
        ("tracking.trackers=[1]", "tracking.trackers.0 = 1 in c.yaml; input should be a valid string."),
        ("run_dir=null", "run_dir = None in c.yaml; input is not a valid path"),
    ],
)
def test_every_rule_has_a_message_of_one_line(override, message):
    """Key, value, file and rule, in one line."""
    assert message_of(override).startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.init=load", "student.model=x"],
        ["student.init=config"],
        ["student.init=config", "student.overrides.num_hidden_layers=6"],
        ["schedule.name=wsd", "schedule.decay_steps=10"],
        ["schedule.name=wsd", "schedule.decay_share=0.5", "schedule.warmup_share=1", "schedule.decay=sqrt"],
        ["schedule.warmup_steps=100"],
        ["optimizer.max_grad_norm=0"],
        ["optimizer.beta1=0"],
        ["mixture.max_epochs=0.5"],
        ["seed=4294967295"],
    ],
    ids=str,
)
def test_the_edges_of_the_rules_are_allowed(overrides):
    """The values next to the forbidden ones, and the other ways to name a student."""
    assert parse(*overrides)


# --- unknown keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "model"), sections_of(), ids=lambda value: str(value).strip("."))
def test_an_unknown_key_gets_the_nearest_known_one_at_every_level(prefix, model):
    """A slip in any section is one line that names the key that was meant."""
    for name in model.model_fields:
        message = message_of(f"{prefix}{name}x=1")
        assert f"unknown key {prefix}{name}x in c.yaml; did you mean '{prefix}{name}'?" == message


def test_an_unknown_key_like_no_other_gets_the_list_of_its_section():
    """Nothing near: the message lists what the section knows."""
    known = ", ".join(f"evaluation.{name}" for name in ("batch_rows", "measures", "reference", "rows"))
    expected = f"unknown key evaluation.qqqqqqqqqqqq in c.yaml; known: {known}."
    assert expected == message_of("evaluation.qqqqqqqqqqqq=1")


def test_an_unknown_key_is_found_in_the_file_too(tmp_path):
    """The message names the file."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, "optimiser": {"lr": 1}}))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert f"unknown key optimiser in {path}; did you mean 'optimizer'?" == str(error.value)


def test_parameters_of_policy_and_losses_pass_through():
    """They belong to the dataclasses of policies and losses, which check them when they are built."""
    config = parse("policy.uniform_mx=0.3")
    with pytest.raises(ConfigError, match="no parameter 'uniform_mx'; did you mean 'uniform_mix'"):
        build_policy(config.policy)


# --- overrides --------------------------------------------------------------------------------------

OTHER_VALUES = {
    "run_dir": Path("elsewhere"),
    "domains": ("a.yaml", "b.yaml"),
    "seed": 7,
    "cache_dir": Path("cache"),
    "teacher.model": "owner/name",
    "teacher.revision": "main",
    "teacher.dtype": "float16",
    "default_teacher": "math",
    "student.init": "config",
    "student.layers": (1, 3, 5),
    "student.model": "other",
    "student.revision": "v1",
    "student.overrides": {"num_hidden_layers": 6, "rms_norm_eps": 0.001, "tie_word_embeddings": False},
    "pack.seq_len": 128,
    "pack.separator": "<s>",
    "pack.processes": 3,
    "guards.floor": 0.02,
    "guards.cap": 0.6,
    "guards.max_move": 0.1,
    "guards.warmup_intervals": 2,
    "guards.evidence": 2.0,
    "mixture.interval_steps": 50,
    "mixture.max_epochs": 2.5,
    "mixture.on_cap": "stop",
    "mixture.block_rows": 64,
    "optimizer.lr": 0.001,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.0,
    "optimizer.max_grad_norm": 0.5,
    "schedule.name": "constant",
    "schedule.warmup_steps": 5,
    "schedule.warmup_share": 0.2,
    "schedule.final_ratio": 0.0,
    "loader.workers": 2,
    "loader.prefetch_steps": 4,
    "loader.max_substitutes": 0,
    "storage.mode": "spool",
    "storage.folder": Path("elsewhere"),
    "storage.max_gb": 0.5,
    "storage.attempts": 1,
    "storage.timeout_s": 5.0,
    "storage.allow_pipe": True,
    "pack.strategy": "best_fit",
    "mixture.count": "tokens",
    "trainer.document_boundaries": True,
    "evaluation.rows": 20,
    "evaluation.batch_rows": 2,
    "evaluation.measures": ("forward_kl",),
    "evaluation.reference": "cards",
    "signal.source": "store",
    "signal.tail": "drop",
    "signal.missing": "live",
    "capture.keep": "drawn",
    "capture.p": 0.9,
    "capture.k": 20,
    "capture.draws": 30,
    "capture.log_prob_bytes": 2,
    "capture.hidden_bytes": 1,
    "capture.temperatures": (2.0, 4.0),
    "capture.folder": Path("/x/logits"),
    "capture.batch_rows": 2,
    "generate.max_new_tokens": 9,
    "generate.temperature": 0.0,
    "generate.top_k": 40,
    "generate.top_p": 0.9,
    "generate.stop": ("<|im_end|>", "</s>"),
    "generate.seed": 3,
    "generate.block_rows": 1,
    "generate.batch_rows": 5,
    "generate.folder": Path("/x/responses"),
    "rollouts.temperature": 0.5,
    "rollouts.top_k": 40,
    "rollouts.top_p": 0.9,
    "rollouts.block_rows": 8,
    "rollouts.buffer_rows": 7,
    "trainer.steps": 20,
    "trainer.batch_rows": 6,
    "trainer.microbatch_rows": 3,
    "trainer.mixed_precision": "bf16",
    "trainer.logits_chunk_tokens": 32,
    "trainer.logits_memory_mb": 64.0,
    "trainer.gradient_checkpointing": True,
    "trainer.checkpoint_steps": 7,
    "trainer.keep_checkpoints": 1,
    "trainer.log_steps": 2,
    "tracking.trackers": ("tensorboard",),
    "tracking.project": "mine",
}


def read(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_an_override_reaches_every_field(key):
    """`key=value` with a YAML value sets exactly that field."""
    value = OTHER_VALUES[key]
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
    config, default = parse(f"{key}={text}"), parse()
    assert value == read(config, key)
    assert value != read(default, key)
    others = [other for other in OTHER_VALUES if other != key]
    assert [read(default, other) for other in others] == [read(config, other) for other in others]


def test_the_table_above_names_every_field():
    """A new field cannot be forgotten here; those of the decay are only allowed together with `wsd`."""
    known = {
        f"{prefix}{name}"
        for prefix, model in sections_of()
        for name, field in model.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    }
    decay = {"schedule.decay_steps", "schedule.decay_share", "schedule.decay"}
    assert known == set(OTHER_VALUES) | {"loss", "teachers", "teacher.online", "selection"} | decay


ONLINE_VALUES = {
    "targets": ("gate_proj",),
    "rank": 2,
    "alpha": 4.0,
    "lr": 0.0,
    "weight_decay": 0.5,
    "max_grad_norm": 0.0,
    "kl_weight": 0.0,
    "ce_weight": 0.25,
}


@pytest.mark.parametrize("key", ONLINE_VALUES)
def test_an_override_reaches_the_teachers_modules(key):
    """A section that may be left out: one value makes it, with defaults for the rest."""
    value = ONLINE_VALUES[key]
    assert set(OnlineModules.model_fields) == set(ONLINE_VALUES)
    assert parse().teacher.online is None
    config = parse(f"teacher.online.{key}={list(value) if isinstance(value, tuple) else value}")
    assert OnlineModules(**{key: value}) == config.teacher.online != OnlineModules()
    assert parse("teacher.online={}").teacher.online == OnlineModules()
    assert config == parse_config(yaml.safe_load(yaml.safe_dump(dump_config(config))), where="c.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (".rnk=3", "unknown key teacher.online.rnk in c.yaml; did you mean 'teacher.online.rank'?"),
        (".rank=0", "teacher.online.rank = 0 in c.yaml; input should be greater than or equal to 1."),
        (".lr=-1", "teacher.online.lr = -1 in c.yaml; input should be greater than or equal to 0."),
        (".alpha=.inf", "teacher.online.alpha = inf in c.yaml; input should be a finite number."),
        (".targets=q_proj", "teacher.online.targets = 'q_proj' in c.yaml; it must be a list: [q_proj]."),
        (".targets=[]", "teacher.online.targets = [] in c.yaml; tuple should have at least 1 item"),
        (".targets=[a, b, a]", "teacher.online: targets = ['a', 'b', 'a'] names a layer twice; name each"),
        ("=true", "teacher.online = True in c.yaml; it must be a section of settings, as in {name: value}."),
        ("={kl_weight: 0, ce_weight: 0}", "teacher.online: kl_weight and ce_weight are both 0, and nothing"),
    ],
)
def test_a_mistake_in_the_teachers_modules_is_named(override, message):
    """A line with the key, the value and the rule."""
    assert message_of(f"teacher.online{override}").startswith(message)


def test_an_override_reaches_a_teacher_and_a_member_of_an_ensemble():
    """`teachers.NAME.KEY=value`, with defaults for the rest."""
    changes = ("teachers.math.model=m", "teachers.both.ensemble.math=3", "teachers.both.ensemble.teacher=1")
    teachers = parse(*changes).teachers
    assert {"math": "m", "both": None} == {name: entry.model for name, entry in teachers.items()}
    assert {"math": 3.0, "teacher": 1.0} == teachers["both"].ensemble
    assert "bfloat16" == teachers["math"].dtype


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teachers.math={}", "teachers.math: a teacher is a `model` or an `ensemble` of names and weights; "),
        ("teachers.x={model: m, ensemble: {teacher: 1}}", "teachers.x: a teacher is a `model` or an `ensem"),
        ("teachers.x={ensemble: {}}", "teachers.x: a teacher is a `model` or an `ensemble` of names and "),
        ("teachers.x={ensemble: {teacher: 1}, dtype: float32}", "teachers.x: revision and dtype belong to"),
        ("teachers.x={ensemble: {teacher: 0}}", "teachers.x.ensemble.teacher = 0 in c.yaml; input should be"),
        ("teachers.x={ensemble: {teacher: .nan}}", "teachers.x.ensemble.teacher = nan in c.yaml; input"),
        (
            "teachers.x={modell: m}",
            "unknown key teachers.x.modell in c.yaml; did you mean 'teachers.x.model'?",
        ),
        ("teachers.A/b={model: m}", "teachers.A/b.[key] = 'A/b' in c.yaml; string should match pattern"),
    ],
)
def test_a_mistake_in_a_teacher_is_named(override, message):
    """A line with the key, the value and the rule."""
    with pytest.raises(ConfigError) as info:
        parse(override)
    assert str(info.value).startswith(message)


def test_a_selection_is_a_name_and_its_parameters():
    """None by default; overrides make it, and it comes back from the dumped config."""
    assert parse().selection is None
    config = parse("selection.name=difference", "selection.share=0.3", "selection.reference.model=m")
    assert {"name": "difference", "share": 0.3, "reference": {"model": "m"}} == config.selection.model_dump()
    assert config == parse_config(dump_config(config), where="x")
    with pytest.raises(ConfigError, match=r"^selection\.name is missing in c.yaml"):
        parse("selection.share=0.3")


def test_positions_of_a_list_are_keys():
    """`loss.1.weight=0.3` changes the second loss and leaves the first alone."""
    terms = [{"name": "cross_entropy"}, {"name": "forward_kl", "weight": 0.2, "temperature": 2.0}]
    config = parse("loss.1.weight=0.3", "domains.0=other.yaml", loss=terms)
    assert {"name": "forward_kl", "weight": 0.3, "temperature": 2.0} == config.loss[1].model_dump()
    assert {"name": "cross_entropy"} == config.loss[0].model_dump()
    assert ("other.yaml",) == config.domains


def test_the_default_objective_can_be_overridden_in_part():
    """Without a `loss` section, `loss.1.weight=0.3` changes DDK's gamma and nothing else."""
    terms = build_terms(parse("loss.1.weight=0.3").loss)
    assert [("cross_entropy", 1.0), ("forward_kl", 0.3)] == [(term.name, term.weight) for term in terms]


def test_a_weight_that_moves_is_reached_and_comes_back():
    """Mappings inside a loss, and the resolved config as YAML."""
    weight = {"schedule": "wsd", "peak": 0.9}
    terms = [{"name": "cross_entropy", "weight": "rest"}, {"name": "forward_kl", "weight": weight}]
    config = parse("loss.1.weight.peak=0.5", loss=terms)
    assert {"schedule": "wsd", "peak": 0.5} == config.loss[1].model_dump()["weight"]
    assert config == parse_config(yaml.safe_load(yaml.safe_dump(dump_config(config))), where="c.yaml")


def test_the_default_policy_can_be_overridden_in_part():
    """Without a `policy` section, `policy.uniform_mix=0.3` is DDK with another alpha."""
    assert Ddk(uniform_mix=0.3) == build_policy(parse("policy.uniform_mix=0.3").policy)
    assert Ddk() == build_policy(parse().policy)  # and the default itself is untouched


def test_parameters_of_an_objective_pass_through():
    """They are checked by the objective; without a section `loss` is applied to the data."""
    assert Distill() == build_objective(parse().objective.model_dump())
    config = parse("objective.share=0.25", objective={"name": "gkd"})
    assert GKD(share=0.25) == build_objective(config.objective.model_dump())
    with pytest.raises(ConfigError, match=r"objective \(gkd\) has no parameter 'shere'.*share"):
        build_objective(parse("objective.shere=0.25", objective={"name": "gkd"}).objective.model_dump())


def test_parameters_of_a_named_policy_are_reached():
    """Mappings inside a policy too."""
    config = parse("policy.weights.code=2", policy={"name": "static", "weights": {"code": 1, "math": 1}})
    assert {"name": "static", "weights": {"code": 2, "math": 1}} == config.policy.model_dump()


def test_a_section_can_be_replaced_whole():
    """A YAML mapping or list is a value like any other."""
    config = parse("schedule={name: wsd, decay_steps: 10}", "loss=[{name: forward_kl}]")
    assert ("wsd", 10, ["forward_kl"]) == (
        config.schedule.name,
        config.schedule.decay_steps,
        [term.name for term in config.loss],
    )


def test_later_overrides_win():
    """They are applied from left to right."""
    assert 30 == parse("trainer.steps=20", "trainer.steps=30").trainer.steps


def test_a_value_may_hold_an_equals_sign():
    """Only the first one separates."""
    assert "a=b" == parse("tracking.project=a=b").tracking.project


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' must be key=value, as in trainer.steps=20."),
        ("=20", "override '=20' must be key=value, as in trainer.steps=20."),
        ("trainer.steps=[", "override 'trainer.steps=[': '[' is not a YAML value."),
        (
            "trainer.steps=2024-99-99",
            "override 'trainer.steps=2024-99-99': '2024-99-99' is not a YAML value.",
        ),
        ("trainer.steps=!!int x", "override 'trainer.steps=!!int x': '!!int x' is not a YAML value."),
        ("trainer.steps.x=1", "override 'trainer.steps.x=1': steps is the value 100, not a section."),
        ("domains.0.x=1", "override 'domains.0.x=1': 0 is the value 'domains', not a section."),
        ("domains.1=x", "override 'domains.1=x': '1' is no position in a list of 1."),
        ("domains.-1=x", "override 'domains.-1=x': '-1' is no position in a list of 1."),
        ("domains.²=x", "override 'domains.²=x': '²' is no position in a list of 1."),
        ("loss.2.weight=1", "override 'loss.2.weight=1': '2' is no position in a list of 2."),
        ("loss.x.weight=1", "override 'loss.x.weight=1': 'x' is no position in a list of 2."),
    ],
)
def test_a_wrong_override_is_one_line(override, message):
    """The message shows the override and says what is wrong with it."""
    assert message == message_of(override)


def test_a_part_of_guards_that_are_off_names_the_whole():
    """`guards: off` is no section that one value could go into."""
    expected = "override 'guards.cap=0.4': guards is off; set it whole, as in guards={name: value}."
    assert expected == message_of("guards=off", "guards.cap=0.4")


def test_an_override_that_asks_for_a_python_object_is_refused(tmp_path):
    """A YAML tag names no code: nothing is built, nothing is run."""
    target = tmp_path / "made"
    message = message_of(f"seed=!!python/object/apply:pathlib.Path.touch [{target}]")
    assert "is not a YAML value" in message
    assert not target.exists()


KEYS = st.lists(
    st.one_of(
        st.sampled_from(
            sorted({part for key in OTHER_VALUES for part in key.split(".")} | {"loss", "policy"})
        ),
        st.sampled_from(["0", "1", "-1", "", "name", "weight", "²"]),
        st.text(max_size=4),
    ),
    max_size=4,
).map(".".join)
VALUES = st.one_of(
    st.sampled_from(
        [
            "1",
            "-1",
            "1e3",
            ".nan",
            "null",
            "[]",
            "{}",
            "[1, {a: 2}]",
            "!!timestamp x",
            "!!bool x",
            "0x_",
            "&a [*a]",
            "*a",
        ]
    ),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(deadline=None, derandomize=True, max_examples=600)
@given(st.lists(st.tuples(KEYS, VALUES).map("=".join) | st.text(max_size=20), min_size=1, max_size=3))
def test_no_override_ever_raises_anything_but_a_config_error_of_one_line(overrides):
    """Random keys and values give either a valid config or a ConfigError."""
    try:
        config = parse(*overrides)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, RunConfig)


# --- files ------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    """A config file with this text."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    """1e-3 without a dot is a string to YAML 1.1; here it is a number wherever one can stand."""
    text = yaml.safe_dump({**SMALLEST, "student": {"init": "config"}}) + (
        "optimizer: {lr: 1e-3, eps: 1E-6, weight_decay: 1.e-2}\n"
        "policy: {name: ddk, uniform_mix: 5e-1}\n"
        "loss: [{name: cross_entropy, weight: 2e+0}, {name: forward_kl, weight: 2e-1}]\n"
    )
    config = load_config(write(tmp_path, text), ["student.overrides.rms_norm_eps=1e-5", "trainer.steps=1e3"])
    assert (1e-3, 1e-6, 1e-2) == (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay)
    assert 0.5 == build_policy(config.policy).uniform_mix
    assert [2.0, 0.2] == [term.weight for term in build_terms(config.loss)]
    assert {"rms_norm_eps": 1e-5} == config.student.overrides
    assert 1000 == config.trainer.steps


def test_words_that_only_look_like_numbers_stay_words(tmp_path):
    """Quoted numbers, names with an e, version-like texts."""
    text = yaml.safe_dump(SMALLEST) + "tracking: {project: '1e-3'}\n"
    config = load_config(write(tmp_path, text), ["teacher.revision=1e3abc", "student.revision=e3"])
    assert ("1e-3", "1e3abc", "e3") == (
        config.tracking.project,
        config.teacher.revision,
        config.student.revision,
    )


def test_a_missing_file_is_one_line(tmp_path):
    """The path, and what to do."""
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "none.yaml")
    assert f"{tmp_path / 'none.yaml'}: no such config; give the path of a YAML file." == str(error.value)


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("[1, 2]", "list"), ("just words", "str")])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path, text, kind):
    """An empty file, a list, a text."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert f"{path} holds {kind}; a config is a mapping of sections." == str(error.value)


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\t- x", "a: 2024-99-99", "x: !!python/name:os.system"])
def test_a_file_that_is_no_yaml_is_one_line(tmp_path, text):
    """The place of the mistake is in the message, without line breaks."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path} cannot be read as YAML: ")
    assert "\n" not in str(error.value)


def test_a_folder_and_a_binary_file_are_one_line(tmp_path):
    """Neither is a config."""
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    for path in (tmp_path, binary):
        with pytest.raises(ConfigError, match="cannot be read as YAML") as error:
            load_config(path)
        assert "\n" not in str(error.value)


def test_keys_that_are_no_texts_are_one_line(tmp_path):
    """`1: 2` at the top of a file."""
    path = write(tmp_path, yaml.safe_dump(SMALLEST) + "1: 2\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_a_dumped_config_reads_back_unchanged():
    """Through YAML and back: the file in a run directory is the run."""
    every = {**OTHER_VALUES, "student.init": "config"}
    overrides = [
        f"{key}={yaml.safe_dump(list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v)}"
        for key, v in every.items()
        if key != "schedule.warmup_share"  # never beside warmup_steps
    ]
    for config in (parse(), parse(*[text.removesuffix("\n...\n") for text in overrides])):
        text = yaml.safe_dump(dump_config(config), sort_keys=False)
        assert config == parse_config(yaml.safe_load(text), where="x")


# without control characters and line separators, which PyYAML's plain style does not keep
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], max_codepoint=0xFFFD), max_size=20)


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-12, 1e3), st.integers(1, 10**9), st.floats(0, 1), TEXTS)
def test_any_value_survives_the_round_trip_exactly(lr, steps, mix, project):
    """Floats to the last bit, large integers, and texts in any script."""
    config = parse(
        trainer={"steps": steps},
        optimizer={"lr": lr},
        policy={"name": "ddk", "uniform_mix": mix},
        tracking={"project": project},
    )
    text = yaml.safe_dump(dump_config(config), sort_keys=False, allow_unicode=True)
    assert config == parse_config(yaml.safe_load(text), where="x")
    assert math.isclose(lr, config.optimizer.lr, rel_tol=0)
