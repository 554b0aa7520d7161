"""The distillation objective as the loss of transformers' `Trainer`.

    from ddkmix.integrations.trainer_loss import DistillationTrainer

    trainer = DistillationTrainer(student, args, train_dataset=rows, teacher=teacher,
                                  loss=["cross_entropy", {"name": "forward_kl", "weight": 0.2}])

Over a mixture: `class Mine(DistillationTrainerMixin, MixtureTrainer)`.

DDP, FSDP and ZeRO act through hooks on the forward pass of the module that they wrap, so the objective is
computed inside it: the student's `forward` gets one more keyword, which only this trainer uses. For all else
(`generate`, evaluation, saving) the student is what it was, and it is saved without a trace of this.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ddkmix.distillation import DistillationModel
from ddkmix.errors import ConfigError, DataError
from ddkmix.losses import LossTerm, build_terms, check_weights, terms_at
from ddkmix.matching import consistency_of, hidden_match_of
from ddkmix.predicted_tokens import predicted
from ddkmix.sections import Schedule
from ddkmix.sources import IGNORE
from ddkmix.stored_teacher import StoredTeacher
from ddkmix.teacher import DomainTeachers, LiveTeacher, SignalSource

__all__ = ["DistillationTrainer", "DistillationTrainerMixin"]

_ABOUT_ROWS = ("domain_ids", "row_places")
"""What batches of a mixture say about their rows; models refuse them."""
_READ = ("input_ids", "labels", "attention_mask", *_ABOUT_ROWS)
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class DistillationTrainerMixin(_Base):
    """Trains on the distillation objective: `class MyTrainer(DistillationTrainerMixin, Trainer)`.

    Rows are `input_ids` and `labels` (-100 where nothing is to be learnt), padded at the end only. The loss
    is the mean over the predicted tokens of an optimizer step, over all micro-batches and, with
    `average_tokens_across_devices`, all processes. `loss/<term>` is logged beside it, each term's mean in
    nats per token since the last line. Evaluation is the Trainer's own: the student's cross-entropy.

    Takes the arguments of the trainer that it is mixed into, and:

    Args:
        args, kwargs: those of the trainer.
        loss: the terms: names, mappings of `name`, `weight` and parameters, or what `ddkmix.build_terms`
            made of them. Weights may move; the steps of the run are the Trainer's `max_steps`.
        teacher: a model, which is frozen and moved to the trainer's device, or an object with
            `signal(batch)`, such as a teacher of ddkmix; None if no term looks at one.
        vocab_size: classes that teacher and student share; None: all of them.
        separator_id: token between documents that must not see each other; None: they do.
        chunk_tokens: tokens whose logits exist at one time; None: as many as `memory_mb` holds.
        memory_mb: megabytes for logits where `chunk_tokens` is None.

    Raises:
        ConfigError: a loss does not fit, or an argument of the Trainer asks for another loss or loop.
        ModelError: hidden states and output layer do not give a model's own logits.
    """

    batch_names: tuple[str, ...] = ()
    """What the teacher wants to know about rows; the batches of a `MixtureMixin` have it."""

    def __init__(
        self,
        *args: Any,
        loss: Sequence[Any],
        teacher: Any = None,
        vocab_size: int | None = None,
        separator_id: int | None = None,
        chunk_tokens: int | None = None,
        memory_mb: float = 512.0,
        **kwargs: Any,
    ) -> None:
        self._terms = _checked(loss, teacher)
        super().__init__(*args, **kwargs)
        self._refuse_arguments()
        student: Any = self.model
        self._objective = DistillationModel(
            student,
            vocab_size=vocab_size,
            separator_id=separator_id,
            chunk_tokens=chunk_tokens,
            memory_mb=memory_mb,
            consistency=consistency_of(self._terms),
        )
        _accept_objective(student)
        self._teacher: SignalSource | None = None
        if isinstance(teacher, SignalSource):
            self._teacher = teacher
        elif teacher is not None:
            frozen = teacher.to(self.args.device).eval().requires_grad_(False)
            self._teacher = LiveTeacher(frozen, vocab_size=vocab_size, separator_id=separator_id)
        if isinstance(teacher, StoredTeacher | DomainTeachers):
            self.batch_names = _ABOUT_ROWS if isinstance(teacher, StoredTeacher) else _ABOUT_ROWS[:1]
        self._count_tokens()
        self._steps_checked = -1
        self._sums = torch.zeros(len(self._terms) + 1, dtype=torch.float64, device=self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective of a micro-batch; of a model in evaluation mode, the trainer's own loss.

        Args:
            model: the student as the Trainer has wrapped it.
            inputs: a batch; the teacher gets all of it.
            return_outputs: give a dict with `loss` beside it; there are no logits.
            num_items_in_batch: predicted tokens of the step; None: the mean over those of this batch.

        Raises:
            ConfigError: the batch has inputs that are not known here, or lacks some.
            DataError: a row is padded at its beginning.
        """
        if not model.training:
            own = {name: value for name, value in inputs.items() if name not in _ABOUT_ROWS}
            count = num_items_in_batch if self._student_counts else None
            return super().compute_loss(model, own, return_outputs, num_items_in_batch=count)
        _check_batch(inputs, self.batch_names)
        terms, signal = self._terms_now(), None
        if any(term.loss.needs_teacher for term in terms):
            assert self._teacher is not None
            signal = self._teacher.signal(inputs)
        compute = partial(
            self._objective,
            inputs["input_ids"],
            inputs["labels"],
            self._token_weight(inputs["labels"], num_items_in_batch),
            terms,
            signal,
        )
        loss, values = model(objective=compute)
        sums = values.double().sum(dim=1)
        self._sums += torch.cat([sums, sums.new_tensor([values.shape[1]])])
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """A line of the log; that of the training loss gets the terms.

        Args:
            logs: what to log; with `loss` in it, every process must call this.
            args, kwargs: other arguments of the trainer's `log`.
        """
        if "loss" in logs:
            accelerator: Any = self.accelerator
            *terms, count = accelerator.reduce(self._sums, reduction="sum").tolist()
            self._sums = torch.zeros_like(self._sums)
            if count:
                names = [f"loss/{term.name}" for term in self._terms]
                logs = {**logs, **{name: nats / count for name, nats in zip(names, terms, strict=True)}}
        super().log(logs, *args, **kwargs)

    def _count_tokens(self) -> None:
        """Have the Trainer count the tokens of a step, and not divide the loss by its micro-batches."""
        self._student_counts = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = True

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Predicted tokens of a step: no token predicts the first label of a row, whatever it is.

        A Trainer leaves it out or not, by the version and the model; now it makes no difference.
        """
        if all("labels" in batch for batch in batch_samples):
            batch_samples = [{**batch, "labels": _without_first(batch["labels"])} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _token_weight(self, labels: Tensor, num_tokens: Any) -> Any:
        """Share of each predicted token in the loss of the step."""
        if num_tokens is None:
            return 1.0 / predicted(labels).sum().clamp(min=1)
        # DDP takes the mean over processes where their sum is wanted
        summed = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return summed / torch.as_tensor(num_tokens, device=labels.device).clamp(min=1)

    def _terms_now(self) -> tuple[LossTerm, ...]:
        schedule, steps = Schedule(name="constant"), self.state.max_steps
        if steps != self._steps_checked:
            check_weights(self._terms, steps, schedule)
            self._steps_checked = steps
        return terms_at(self._terms, self.state.global_step, steps, schedule)

    def _refuse_arguments(self) -> None:
        """What would be ignored without a word, or makes the loss another one."""
        config = getattr(self.model, "config", None)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        wrong = {
            "model_init: it makes models of which this loss knows nothing; give the model": self.model_init,
            "compute_loss_func: it is a second loss; leave it out": self.compute_loss_func,
            "label_smoothing_factor: `loss` has no such term; set it to 0": self.args.label_smoothing_factor,
            "n_gpu > 1: DataParallel cannot split a teacher's signal; use torchrun": self.args.n_gpu > 1,
            "parallelism_config: rows are split or weights are shards; use data parallelism": any(
                getattr(parallel, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")
            ),
            "output_router_logits: the routers' loss is not part of `loss`; set it to False": getattr(
                config, "output_router_logits", False
            ),
            "a PEFT model: its output layer may be an adapted one; merge the adapter": hasattr(
                self.model, "peft_config"
            ),
        }
        for what, found in wrong.items():
            if found:
                raise ConfigError(f"{type(self).__name__} does not support {what}.")


class DistillationTrainer(DistillationTrainerMixin, Trainer):
    """The `Trainer` of transformers with a distillation loss; see `DistillationTrainerMixin`."""


def _checked(loss: Sequence[Any], teacher: Any) -> tuple[LossTerm, ...]:
    """The terms, if such a teacher can serve them."""
    if isinstance(loss, str | Mapping) or not isinstance(loss, Sequence):
        raise ConfigError(f"loss = {loss!r}; give a list of terms, if only of one.")
    made = loss and all(isinstance(term, LossTerm) for term in loss)
    terms = tuple(loss) if made else build_terms(loss)
    if hidden_match_of(terms) is not None:
        raise ConfigError(
            "loss hidden_match compares layers by projections, which a Trainer would neither train nor "
            "save; use `ddkmix train`, or leave it out."
        )
    if teacher is not None and not isinstance(teacher, SignalSource | nn.Module):
        raise ConfigError(f"teacher is a {type(teacher).__name__}; give a model, or what has signal(batch).")
    wanting = [term.name for term in terms if term.loss.needs_teacher]
    if teacher is None and wanting:
        raise ConfigError(f"loss {wanting[0]} needs a teacher, and teacher is None; give one.")
    return terms


def _accept_objective(student: Any) -> None:
    """Let a student's forward pass compute what it is handed, in the place of its logits.

    A method of the instance and not a hook, which cannot stand in for `forward`; Accelerate's autocast, made
    in the same way, comes on top of it. `__signature__` is what a Trainer and `generate` read; with a
    `__wrapped__` Accelerate would take the method off when it unwraps the model.
    """
    plain: Callable[..., Any] = student.forward.__func__

    def forward(self: Any, *args: Any, objective: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs) if objective is None else objective()

    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    student.forward = MethodType(forward, student)


def _check_batch(inputs: Mapping[str, Any], names: Sequence[str]) -> None:
    """What is not looked at must not be there."""
    if missing := [name for name in ("input_ids", "labels", *names) if name not in inputs]:
        raise ConfigError(
            f"a batch has {sorted(inputs)} and lacks {', '.join(missing)}; labels are the tokens themselves, "
            "and a mixture's batches have the others (MixtureTrainer)."
        )
    if unknown := [name for name in inputs if name not in _READ]:
        raise ConfigError(
            f"a batch has {', '.join(unknown)}, which this loss does not look at; let the collator leave it "
            "out (separator_id keeps the documents of a row apart)."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or bool((mask[:, 1:] > mask[:, :-1]).any())):
        raise DataError(
            "attention_mask has zeros before ones, or is no (rows, tokens); pad at the end only: "
            "tokenizer.padding_side = 'right'."
        )


def _without_first(labels: Tensor) -> Tensor:
    labels = labels.clone()
    labels[..., 0] = IGNORE
    return labels
