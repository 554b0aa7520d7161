"""What pair objectives share: by how much one response is ahead of the other."""

from typing import Any


def per_response(total: Any, tokens: Any, *, length_normalize: bool) -> Any:
    """(B,) sums over responses, or means over their tokens."""
    return total / tokens if length_normalize else total


def log_ratio(scores: Any, *, length_normalize: bool) -> Any:
    """log q(y|x) - log p(y|x) of each response, or its mean over the tokens: DPO's implicit reward over beta,
    with the teacher as the reference."""
    return per_response(scores.student - scores.teacher, scores.tokens, length_normalize=length_normalize)


def log_likelihood(scores: Any, *, length_normalize: bool) -> Any:
    """log q(y|x) of each response, or its mean over the tokens."""
    return per_response(scores.student, scores.tokens, length_normalize=length_normalize)
