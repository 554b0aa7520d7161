"""The tables of `BENCHMARKS.md`, from the JSON of a run."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from on_policy_bench.race import OURS, PEERS


def markdown(results: Mapping[str, Any]) -> str:
    """Everything that was measured, ready to be pasted."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Mapping[str, Any]) -> Iterator[str]:
    job, runs = results["job"], results["runs"]
    yield f"Machine: {results['machine']}. {results['date']}."
    yield f"`{results['command']}`"
    yield (
        f"{job['batch_rows']} prompts a step, responses of {job['max_new_tokens']} tokens, "
        f"{results['threads']} threads, {results['rounds']} turns of "
        f"{job['steps'] - job['warmup_steps']} steps after {job['warmup_steps']}; "
        f"teacher in {job['teacher_dtype']}. {_versions(runs)}."
    )
    if "ddkmix-minillm" in runs:
        yield (
            f"ddkmix's MiniLLM draws with a teacher's share of {job['teacher_share']:g}; TRL's has no "
            "teacher-mixed sampling."
        )
    yield "\n".join(_table(runs))
    yield from (f"Ratio {line}" for line in _verdicts(runs))
    uneven = [name for name, own in runs.items() if not full_length(own, job)]
    if uneven:
        yield f"Not all responses had their full length: {', '.join(uneven)}."
    if results["errors"]:
        yield "Failed:\n\n" + "\n".join(f"- {name}: {error}" for name, error in results["errors"].items())


def _table(runs: Mapping[str, Any]) -> Iterator[str]:
    yield "| | s a step | tokens/s | tokens a step | peak MB |"
    yield "|---|---:|---:|---:|---:|"
    for name, own in runs.items():
        cells = [_spread(own, "median_step_s", ".2f"), _spread(own, "tokens_per_s", ".1f")]
        cells += [f"{median_of(own, 'tokens_per_step'):.0f}", _spread(own, "peak_mb", ".0f")]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _verdicts(runs: Mapping[str, Any]) -> Iterator[str]:
    for objective, ours in OURS.items():
        for peer in PEERS[objective]:
            if ours in runs and peer in runs:
                speed, memory = ratios(runs[ours], runs[peer])
                yield f"of {ours} to {peer}: tokens per second {speed:.2f}x, peak memory {memory:.2f}x."


def ratios(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> tuple[float, float]:
    """Median over the pairs of turns: tokens per second and peak memory, ours divided by the peer's."""
    pairs = list(zip(ours, peer, strict=False))  # one that failed later has fewer
    speed, memory = (
        statistics.median(own[key] / other[key] for own, other in pairs)
        for key in ("tokens_per_s", "peak_mb")
    )
    return speed, memory


def full_length(runs: list[dict[str, Any]], job: Mapping[str, Any]) -> bool:
    """Whether every step made as many tokens as were asked for."""
    return all(own["tokens_per_step"] == job["batch_rows"] * job["max_new_tokens"] for own in runs)


def median_of(runs: list[dict[str, Any]], key: str) -> float:
    """Over turns."""
    return float(statistics.median(own[key] for own in runs))


def _spread(runs: list[dict[str, Any]], key: str, form: str) -> str:
    values = [own[key] for own in runs]
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def _versions(runs: Mapping[str, Any]) -> str:
    packages = {name: own[0]["versions"] for name, own in runs.items()}
    trl = [f"TRL {found['trl']} ({name})" for name, found in packages.items() if "trl" in found]
    others = {key: value for found in packages.values() for key, value in found.items() if key != "trl"}
    return ", ".join([*trl, *(f"{name} {version}" for name, version in others.items())])
