"""The rows of one step: those of the data, and rows that put another response behind a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ddkmix.answers import Answer, Answers, Place
from ddkmix.losses import LossTerm
from ddkmix.objectives import Part
from ddkmix.preference.on_policy import Source
from ddkmix.sources import IGNORE

Batch = Mapping[str, Tensor]


@dataclass(kw_only=True, slots=True, eq=False)
class StepRows:
    """What an objective makes its parts of."""

    batch: Batch
    """The planner's rows of this rank: `input_ids` and `labels` (B, T), `domain_ids` (B,)."""
    places: Sequence[Place]
    """Of these rows."""
    num_prompts: int
    """Rows with prompts in the global batch."""
    prompt_numbers: Sequence[int]
    """Of this rank's rows with prompts among those, in order."""
    answers: Answers
    source: Source
    """Where the student's responses of this step come from."""
    terms: Sequence[LossTerm]
    """`loss`, with the weights in force."""
    step: int
    """Completed ones."""
    steps: int
    padding_id: int
    said: list[Answer] = field(default_factory=list)
    """The student's responses that were asked for, for the record."""

    def anchor(self) -> list[Part]:
        """`loss` on the rows of data; nothing where there is no term."""
        return [Part(name="train", batch=self.batch, what=self.terms)] if self.terms else []

    def teacher_responses(self, answers: Sequence[Answer] | None = None) -> list[Answer]:
        """The stored responses to this rank's prompts, without those that say nothing.

        Args:
            answers: to the prompts of these instead.
        """
        places = self._asked() if answers is None else [answer.place for answer in answers]
        return self.answers.of_teacher(places)

    def student_responses(self) -> list[Answer]:
        """New responses to this rank's prompts, or old ones with theirs. Collective, once a step."""
        if self.source == "generate":
            self.said = self.answers.of_student(self._asked(), self.step)
        else:
            self.said = self.answers.replayed(self.prompt_numbers, self.num_prompts, self.step)
        return self.said

    def with_responses(self, answers: Sequence[Answer]) -> Batch:
        """The rows of plain text as they are, and the answers in the place of rows with prompts.

        Args:
            answers: to any prompts.
        """
        text = [i for i, place in enumerate(self.places) if not self.answers.has_prompts(place.domain)]
        own = {name: self.batch[name][text] for name in ("input_ids", "labels", "domain_ids")}
        if not answers:
            return own
        other = self.of_responses(answers)
        width = max(own["input_ids"].shape[1] if text else 0, other["input_ids"].shape[1])
        fill = {"input_ids": self.padding_id, "labels": IGNORE}
        wide = {
            name: torch.cat([_widened(part[name], width, value) for part in (own, other)])
            for name, value in fill.items()
        }
        return {**wide, "domain_ids": torch.cat([own["domain_ids"], other["domain_ids"]])}

    def of_responses(self, answers: Sequence[Answer]) -> dict[str, Tensor]:
        """Rows of prompts and responses, no longer than the longest; labels ignore prompts.

        Args:
            answers: to any prompts; none gives a batch of no rows.
        """
        width = max((len(answer.prompt) + len(answer.ids) for answer in answers), default=2)
        input_ids = np.full((len(answers), width), self.padding_id, dtype=np.int64)
        labels = np.full((len(answers), width), IGNORE, dtype=np.int64)
        for row, answer in enumerate(answers):
            start, end = len(answer.prompt), len(answer.prompt) + len(answer.ids)
            input_ids[row, :start], input_ids[row, start:end] = answer.prompt, answer.ids
            labels[row, start:end] = answer.ids
        numbers = [answer.place.domain for answer in answers]
        rows = {"input_ids": input_ids, "labels": labels, "domain_ids": np.array(numbers, dtype=np.int64)}
        return {name: torch.from_numpy(array) for name, array in rows.items()}

    def pairs(self, rejected: Sequence[Answer], *, graded: bool = False) -> dict[str, Tensor]:
        """Rows 2 i, the teacher's responses, and 2 i + 1, the student's to the same prompts.

        Prompts to which the teacher has nothing to say are left out.

        Args:
            rejected: the student's.
            graded: add `quality` (B,): Rouge-L of each response's tokens against the data's.
        """
        chosen = {answer.place: answer for answer in self.teacher_responses(rejected)}
        pairs = [(chosen[bad.place], bad) for bad in rejected if bad.place in chosen]
        in_order = [answer for pair in pairs for answer in pair]
        batch = self.of_responses(in_order)
        if graded:
            grades = [rouge_l(answer.ids, self.answers.of_data(answer.place)) for answer in in_order]
            batch["quality"] = torch.tensor(grades, dtype=torch.float32)
        return batch

    def _asked(self) -> list[Place]:
        return [place for place in self.places if self.answers.has_prompts(place.domain)]


def rouge_l(ids: Int[np.ndarray, " n"], reference: Int[np.ndarray, " m"]) -> float:
    """Rouge-L's F-measure on tokens: 2 lcs / (n + m), lcs the longest common subsequence's length.

    Args:
        ids: of a response.
        reference: of another.
    """
    row = np.zeros(len(reference) + 1, dtype=np.int64)
    for token in ids.tolist():
        # a match extends what was before it, and a running maximum carries the rest on
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], (row[:-1] + 1) * (reference == token)))
    return 2 * int(row[-1]) / max(len(ids) + len(reference), 1)


def _widened(tokens: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=fill)
