"""The sections about teachers: who they are, and what of one of them is trained beside its student."""

from typing import Annotated

from pydantic import Field, model_validator

from ddkmix.sections import Dtype, NonNegative, Positive, PositiveInt, Section


class OnlineModules(Section):
    """Low-rank corrections of the teacher's linear layers, trained beside the student.

    OUR RECONSTRUCTION of OKD (arXiv 2409.12512), of which only the abstract could be read.
    """

    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Last parts of the names of the linear layers that get a module each."""
    rank: PositiveInt = 8
    """Rank of a correction."""
    alpha: Positive = 16.0
    """A correction is multiplied by alpha / rank."""
    lr: NonNegative = 1e-4
    """Peak learning rate of the modules, which follows `schedule` as the student's does; 0, for a control,
    leaves the teacher as it is."""
    weight_decay: NonNegative = 0.0
    """Of the modules, in AdamW; its other constants are those of `optimizer`."""
    max_grad_norm: NonNegative = 1.0
    """The modules' gradients are clipped to this global norm; 0 switches clipping off."""
    kl_weight: NonNegative = 1.0
    """Weight of KL(student || teacher) in the modules' objective; the student is held fixed there."""
    ce_weight: NonNegative = 1.0
    """Weight of the teacher's cross-entropy with the text."""

    @model_validator(mode="after")
    def _learns(self) -> "OnlineModules":
        if not self.kl_weight and not self.ce_weight:
            raise ValueError("kl_weight and ce_weight are both 0, and nothing is left to learn; raise one")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets = {list(self.targets)} names a layer twice; name each once")
        return self


class Teacher(Section):
    """The model to learn from."""

    model: str
    """Local folder or Hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = "bfloat16"
    """Parameters are loaded in this type, and never trained."""
    online: OnlineModules | None = None
    """Small modules on the teacher that learn from the student during training; without, it stays as it is.
    `online: {}` takes all defaults."""


class FurtherTeacher(Section):
    """A teacher beside the config's `teacher`: another model, or an ensemble of models."""

    model: str | None = None
    """Local folder or Hub id; a model that shares the tokenizer of `teacher`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = "bfloat16"
    """Parameters are loaded in this type."""
    ensemble: dict[str, Positive] | None = None
    """Instead of a model: weights of other entries, or of `teacher`. p is proportional to the product of
    p_k ** weight_k, weights normalised: a mean of log-probabilities at temperature 1."""

    @model_validator(mode="after")
    def _one_kind(self) -> "FurtherTeacher":
        if (self.model is None) == (not self.ensemble):
            raise ValueError("a teacher is a `model` or an `ensemble` of names and weights; give one of them")
        if self.ensemble and {"revision", "dtype"} & self.model_fields_set:
            raise ValueError("revision and dtype belong to the members of an ensemble; set them there")
        return self
