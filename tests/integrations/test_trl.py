"""The trainers of TRL over a mixture: they prepare the rows of all domains at once and keep them apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from ddkmix import GapEvaluator
from ddkmix.errors import ConfigError
from ddkmix.integrations.trainer_data import DOMAIN_COLUMN, joined, taken_apart
from ddkmix.integrations.transformers import mixture_trainer
from tests.integrations.conftest import Parts, Rows, dealt, rows_of
from tests.integrations.policies import Rotating
from tests.integrations.trainers import Constant, arguments, student

trl = pytest.importorskip("trl")
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl.experimental.gold import GOLDConfig, GOLDTrainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # what TRL calls of transformers
    pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning"),
]
DOMAINS = {"code": 50, "math": 40}
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No telemetry."""
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    """The tests' tokenizer with padding and a chat template."""
    found = AutoTokenizer.from_pretrained(tokenizer_folder)
    found.pad_token_id = 1
    found.chat_template = CHAT
    return found


def texts() -> dict[str, Dataset]:
    """Documents that say which they are."""
    return {
        name: Dataset.from_list([{"text": f"{name} {i}"} for i in range(n)]) for name, n in DOMAINS.items()
    }


def chats() -> dict[str, Dataset]:
    """A question and an answer each."""
    rows = {
        name: [
            [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "yes"}]
            for i in range(n)
        ]
        for name, n in DOMAINS.items()
    }
    return {name: Dataset.from_dict({"messages": found}) for name, found in rows.items()}


def prompts() -> dict[str, Dataset]:
    """The questions alone."""
    return {
        name: Dataset.from_dict({"prompt": [[message] for message, _ in rows["messages"]]})
        for name, rows in chats().items()
    }


def sft(folder: Path, tokenizer: Any, data: Any = None, *, cls: Any = None, **changes: Any) -> Any:
    """An SFTTrainer over the documents, 12 a step."""
    names = ("evaluator", "policy", "mixture_options", "interval_steps")
    given = {"policy": Rotating(), "interval_steps": 2, "evaluator": Constant(tuple(DOMAINS))}
    given |= {name: changes.pop(name) for name in names if name in changes}
    return (cls or mixture_trainer(SFTTrainer))(
        changes.pop("model", None) or student(),
        args=SFTConfig(**arguments(folder, **{"bf16": False, "max_length": 64, **changes})),
        train_dataset=texts() if data is None else data,
        processing_class=tokenizer,
        **given,
    )


def names_of(batch: dict[str, Any], tokenizer: Any) -> list[str]:
    """The documents of a micro-batch, as they were written; "!" is the padding."""
    return [text.strip(" !") for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]


def recorded(run: Any, name: Callable[[Any], Any]) -> dict[int, list[Any]]:
    """Trains; what each step got, one entry for each micro-batch."""
    found: dict[int, list[Any]] = {}
    original = run._prepare_inputs

    def note(inputs: Any) -> Any:
        found.setdefault(run.state.global_step, []).append(name(inputs))
        return original(inputs)

    run._prepare_inputs = note
    run.train()
    return found


# --- SFTTrainer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_sft_on_packed_rows_has_those_of_our_own_trainer(
    trainer_rows: Rows,
    parts: Callable[..., Parts],
    tokenizer: Any,
    tmp_path: Path,
    accumulation: int,
    workers: int,
) -> None:
    """A ready mixture; every token of every row at every step."""
    made = parts(num_workers=workers)
    run = sft(
        tmp_path,
        tokenizer,
        made.mixture,
        model=made.student,
        evaluator=made.evaluator,
        accumulation=accumulation,
        max_steps=len(trainer_rows),
    )
    rows = recorded(run, lambda batch: rows_of(batch["input_ids"] * batch["attention_mask"]))
    assert trainer_rows == [dealt(step) for step in rows.values()]


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 2), (3, 0)])
def test_sft_on_texts_follows_the_weights_exactly(
    tokenizer: Any, tmp_path: Path, accumulation: int, workers: int
) -> None:
    """Rows of 12: 0.9 of each interval's to one domain, then to the other, from the step after the change."""
    run = sft(tmp_path, tokenizer, accumulation=accumulation, dataloader_num_workers=workers, max_steps=6)
    rows = recorded(run, lambda batch: names_of(batch, tokenizer))
    shares = [sum(name.startswith("code") for part in step for name in part) for step in rows.values()]
    assert [11, 11, 1, 1, 11, 11] == shares  # 10.8, 10.6, 0.8, 1.0, 10.8 and 10.6 are owed
    assert [12] * 6 == [sum(len(part) for part in step) for step in rows.values()]
    everyone = [name for step in rows.values() for part in step for name in part]
    assert 72 == len(set(everyone))  # no row twice before its epoch has ended


def test_sft_resumes_from_its_own_checkpoint(tokenizer: Any, tmp_path: Path) -> None:
    """The rows of an uninterrupted run, with another number of workers; the state is small JSON."""
    whole = recorded(sft(tmp_path / "whole", tokenizer), lambda batch: names_of(batch, tokenizer))
    sft(tmp_path, tokenizer, save_strategy="steps", save_steps=3, dataloader_num_workers=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    assert 36 == sum(state["MixtureCallback"]["attributes"]["saved"]["mixture"]["planner"]["served"])
    again = sft(tmp_path, tokenizer)
    train = again.train
    again.train = lambda: train(resume_from_checkpoint=str(checkpoint))
    rows = recorded(again, lambda batch: names_of(batch, tokenizer))
    assert {step: found for step, found in whole.items() if step >= 3} == rows


def test_records_of_sft_keep_their_own_metrics(tokenizer: Any, tmp_path: Path) -> None:
    """Its `log` gives away what it has collected since the last record; ours must not take it."""
    run = sft(tmp_path, tokenizer, max_steps=4, logging_steps=2)
    run.train()
    history = run.state.log_history
    assert [2, 4] == [r["step"] for r in history if "mean_token_accuracy" in r and "loss" in r]
    assert [0, 2, 4] == [r["step"] for r in history if "mixture/weight/code" in r]
    assert not [r for r in history if "mixture/weight/code" in r and "mean_token_accuracy" in r]


def test_evaluation_of_sft_is_as_before(tokenizer: Any, tmp_path: Path) -> None:
    """Its eval datasets are prepared by TRL and served by its own loader."""
    run = mixture_trainer(SFTTrainer)(
        student(),
        args=SFTConfig(**arguments(tmp_path, bf16=False, max_steps=2, eval_strategy="steps", eval_steps=1)),
        train_dataset=texts(),
        eval_dataset=texts()["math"],
        processing_class=tokenizer,
    )
    run.train()
    assert [1, 2] == [r["step"] for r in run.state.log_history if "eval_loss" in r]


def test_an_evaluator_measures_a_student_of_trl(tokenizer: Any, tmp_path: Path) -> None:
    """TRL patches the student's forward; its logits stay those of a plain model."""
    held_out = {name: [{"input_ids": [i, i + 1, i + 2]} for i in range(9)] for name in DOMAINS}
    evaluator = GapEvaluator(held_out, reference=dict.fromkeys(DOMAINS, 1.0))
    before = evaluator.measure(student()).student_loss.tolist()
    run = sft(tmp_path, tokenizer, evaluator=evaluator, max_steps=1)
    run.train()
    (first,) = [r for r in run.state.log_history if r["step"] == 0]
    assert before == pytest.approx([first["student_loss/code"], first["student_loss/math"]])


# --- domains stay apart -----------------------------------------------------------------------------


def test_rows_that_the_trainer_shuffles_or_drops_stay_with_their_domain(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`shuffle_dataset`, and rows that truncation leaves without a label: dropped with a line."""
    long = {"prompt": "x" * 40, "completion": "never seen"}
    data = {
        "code": Dataset.from_list([{"prompt": f"code {i}", "completion": " y"} for i in range(12)] + [long]),
        "math": Dataset.from_list([{"prompt": f"math {i}", "completion": " n"} for i in range(8)]),
    }
    run = sft(tmp_path, tokenizer, data, max_length=20, shuffle_dataset=True, max_steps=4)
    assert (12, 8) == run.mixture.settings.num_rows
    assert "SFTTrainer kept 12 of the 13 rows of domain 'code'" in caplog.text
    rows = {
        row.domain: [row.dataset[i]["input_ids"] for i in range(row.num_rows)]
        for row in run.mixture.stream.rows
    }
    read = {name: [text.split()[0] for text in tokenizer.batch_decode(ids)] for name, ids in rows.items()}
    assert {"code": ["code"] * 12, "math": ["math"] * 8} == read
    assert DOMAIN_COLUMN not in run.mixture.stream.rows[0].dataset.column_names
    run.train()


def test_packing_is_refused_before_anything_is_tokenised(tokenizer: Any, tmp_path: Path) -> None:
    """A packed row would be of several domains."""
    with pytest.raises(ConfigError, match="packing=True would put rows of several domains into one"):
        sft(tmp_path, tokenizer, packing=True)


def test_a_trainer_that_makes_other_rows_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """Whatever the reason, the mark is gone."""

    class Summaries(SFTTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._prepare_dataset(dataset, *args, **kwargs).select_columns(["input_ids", "labels"])

    with pytest.raises(ConfigError, match="SFTTrainer has made other rows of train_dataset"):
        sft(tmp_path, tokenizer, cls=mixture_trainer(Summaries))


def test_joining_and_taking_apart_are_inverse() -> None:
    """Also after a shuffle, each domain in the order in which the rows then are."""
    data = chats()
    whole = joined(data, "SFTTrainer")
    assert 90 == len(whole)
    apart = taken_apart(whole, data, "SFTTrainer")
    assert {name: rows[:] for name, rows in data.items()} == {name: rows[:] for name, rows in apart.items()}
    mixed = taken_apart(whole.shuffle(seed=3), data, "SFTTrainer")
    for name, rows in data.items():
        assert sorted(map(str, rows["messages"])) == sorted(map(str, mixed[name]["messages"]))
        assert list(rows["messages"]) != list(mixed[name]["messages"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows.rename_column("text", "prompt"),
            r"\['math'\] has columns .*prompt.* and \['code'\]",
        ),
        (lambda rows: rows.to_list(), r"\['math'\] is a list; SFTTrainer prepares its rows and needs a"),
        (lambda rows: rows.to_iterable_dataset(), r"\['math'\] is a IterableDataset; it must be map-style"),
    ],
)
def test_datasets_that_trl_cannot_prepare_are_refused(
    tokenizer: Any, tmp_path: Path, change: Callable[[Dataset], Any], message: str
) -> None:
    """What it is, and the way out, in one line."""
    data = {**texts(), "math": change(texts()["math"])}
    assert isinstance(data["math"], Dataset | list | IterableDataset)
    with pytest.raises(ConfigError, match=message):
        sft(tmp_path, tokenizer, data)


# --- distillation -----------------------------------------------------------------------------------


def distilling(kind: str, folder: Path, tokenizer: Any, **changes: Any) -> Any:
    """A trainer with a teacher over two domains of chats."""
    config, cls, data = {
        "gkd": (GKDConfig, GKDTrainer, chats()),
        "gold": (GOLDConfig, GOLDTrainer, chats()),
        "distillation": (DistillationConfig, DistillationTrainer, prompts()),
    }[kind]
    length = {"max_new_tokens": 3} if kind == "gkd" else {"max_completion_length": 3}
    given = {"policy": Rotating(), "interval_steps": 2, "evaluator": Constant(tuple(DOMAINS))}
    return mixture_trainer(cls)(
        student(),
        teacher_model=student(1),
        args=config(**arguments(folder, **{"bf16": False, "max_steps": 6, **length, **changes})),
        train_dataset=data,
        processing_class=tokenizer,
        **given,
    )


def questions(batch: Any, tokenizer: Any) -> list[str]:
    """What the users of a batch have asked."""
    if isinstance(batch, list):
        return [row["prompt"][0]["content"] for row in batch]
    texts = tokenizer.batch_decode(batch["prompts"], skip_special_tokens=True)
    return [text.split("user: ")[1].split("assistant")[0].strip() for text in texts]


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (3, 2)])
@pytest.mark.parametrize("kind", ["gkd", "gold", "distillation"])
def test_trainers_with_a_teacher_follow_the_weights_exactly(
    tokenizer: Any, tmp_path: Path, kind: str, accumulation: int, workers: int
) -> None:
    """GKD takes micro-batches; the two others the rows of the whole step, once for each of them."""
    run = distilling(kind, tmp_path, tokenizer, accumulation=accumulation, dataloader_num_workers=workers)
    found = recorded(run, lambda batch: questions(batch, tokenizer))
    copies = 1 if kind == "gkd" else accumulation
    shares, everyone = [], []
    for step in found.values():
        assert accumulation == len(step)
        assert all(part == step[0] for part in step) or copies == 1
        rows = [row for part in step[::copies] for row in part]
        everyone += rows
        shares.append(sum(row.startswith("code") for row in rows))
    assert [11, 11, 1, 1, 11, 11] == shares
    assert 72 == len(everyone) == len(set(everyone))


def test_trainers_with_a_teacher_need_rows_of_their_own_kind(
    parts: Callable[..., Parts], tokenizer: Any, tmp_path: Path
) -> None:
    """Packed rows are no chats."""
    with pytest.raises(ConfigError, match="GKDTrainer prepares rows of its own kind; give"):
        mixture_trainer(GKDTrainer)(
            student(),
            teacher_model=student(1),
            args=GKDConfig(**arguments(tmp_path, bf16=False)),
            train_dataset=parts().mixture,
            processing_class=tokenizer,
        )


def test_several_completions_of_a_prompt_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    """GOLD would repeat each row in its batch."""
    with pytest.raises(ConfigError, match=r"num_generations.: 2.*defaults"):
        distilling("gold", tmp_path, tokenizer, num_generations=2, lmbda=1.0)


def test_trainers_that_sample_in_their_own_way_are_refused() -> None:
    """GRPO and KTO choose the order of their rows themselves."""
    for name in ("GRPOTrainer", "KTOTrainer", "RLOOTrainer"):
        with pytest.raises(ConfigError, match=f"{name}.*chooses batches in its own way"):
            mixture_trainer(getattr(trl, name))
