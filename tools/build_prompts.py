"""Build `domains/prompts/` from pinned packages: `python tools/build_prompts.py --out domains/prompts`.

Prompts with the responses that people wrote, as chat messages in JSON lines, for domains whose rows are
examples. The pins are in `domain_sources/prompts.yaml`, the readers in `domain_sources/readers/prompts.py`.
"""

import argparse
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from domain_sources.archives import fetch
from domain_sources.cards import write_licenses
from domain_sources.model import BuildError, Package, Pair
from domain_sources.split import digest, fingerprint

MANIFEST = Path(__file__).parent / "domain_sources" / "prompts.yaml"
LICENCE_TEXTS = "spdx-license-list"
HELD_OUT = 64
"""Examples of each domain that are measured and not trained on."""
MAX_EPOCHS = 8
README = """# Prompts

Questions with the answers that people gave them, in three domains of chat messages: one JSON object a line,
`prompt_response: {messages: messages}` in the card. As far as their packages tell, no answer is a model's.
Everything may be redistributed, and the licence texts travel in `licenses/`. These domains are no part of
`domains: [domains]`; name `domains/prompts` to use them.

| domain | train | held-out | bytes of prompts | bytes of responses | what |
|---|---:|---:|---:|---:|---|
"""
README_TAIL = """
`python tools/build_prompts.py --out domains/prompts` rebuilds everything byte for byte from the packages
below. Markup is made plain; of `chat_code` the first line of a prompt ("Write the JavaScript function ...")
is ours. Left out are prompts that come again, examples of more than 1,200 bytes, and train examples whose
response (of 40 characters or more) stands in the held-out split as well; from `chatterbot-corpus` also topics
that are opinions, jokes, a bot's talk of itself, or look generated. The 64 held-out examples of a domain are
chosen by a hash of their prompt.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptDomain:
    """One domain of the manifest."""

    name: str
    description: str
    license: str
    most_bytes: int
    """Of a prompt and its response together."""
    parts: tuple[dict[str, object], ...]
    """`reader`, as `module:function` below `domain_sources.readers`, and the `packages` that it opens."""

    @property
    def packages(self) -> list[str]:
        """The packages of all parts."""
        return [str(name) for part in self.parts for name in part["packages"]]


def read_pairs(domain: PromptDomain, archives: dict[str, Path]) -> list[Pair]:
    """Return all pairs of a domain in the order of their packages."""
    found: list[Pair] = []
    for part in domain.parts:
        module, function = str(part["reader"]).split(":")
        read = getattr(importlib.import_module(f"domain_sources.readers.{module}"), function)
        found += read({name: archives[name] for name in part["packages"]})
    return found


def split(pairs: list[Pair], domain: str, most_bytes: int) -> dict[str, list[Pair]]:
    """Return the pairs of both sides, without repeats, in the order of a hash."""
    kept: dict[int, Pair] = {}
    for pair in pairs:
        size = len((pair.prompt + pair.response).encode())
        if pair.prompt.strip() and pair.response.strip() and size <= most_bytes:
            kept.setdefault(fingerprint(pair.prompt.lower()), pair)
    order = sorted(kept.values(), key=lambda pair: digest("prompts", domain, pair.prompt))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    # "1963" answers many questions; a whole paragraph, one
    known = {fingerprint(pair.response.lower()) for pair in held_out if len(pair.response) >= 40}
    return {"held_out": held_out, "train": [p for p in rest if fingerprint(p.response.lower()) not in known]}


def as_lines(pairs: list[Pair]) -> str:
    """Return pairs as JSON lines of chat messages."""
    lines = []
    for pair in pairs:
        turns = (("user", pair.prompt), ("assistant", pair.response))
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages, "source": pair.name}, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)


def card(domain: PromptDomain, packages: dict[str, Package]) -> str:
    """Return a domain card as YAML."""
    keys = ("package", "registry", "version", "license", "sha256", "note")
    tree = {
        "name": domain.name,
        "description": domain.description,
        "prompt_response": {"messages": "messages"},
        "train": f"{domain.name}/train-000000.jsonl",
        "held_out": f"{domain.name}/held_out-000000.jsonl",
        "license": domain.license,
        "max_epochs": MAX_EPOCHS,
        "sources": [{key: getattr(packages[name], key) for key in keys} for name in domain.packages],
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def readme(
    domains: list[PromptDomain], packages: dict[str, Package], sides: dict[str, dict[str, list[Pair]]]
) -> str:
    """Return the README beside the cards."""
    text = README
    for domain in domains:
        train, held_out = sides[domain.name]["train"], sides[domain.name]["held_out"]
        prompts = sum(len(pair.prompt.encode()) for pair in train + held_out)
        responses = sum(len(pair.response.encode()) for pair in train + held_out)
        text += f"| `{domain.name}` | {len(train)} | {len(held_out)} | {prompts:,} | {responses:,} "
        text += f"| {domain.description} |\n"
    text += (
        README_TAIL + "\n| package | registry | version | licence | what was taken |\n|---|---|---|---|---|\n"
    )
    for name in dict.fromkeys(name for domain in domains for name in domain.packages):
        entry = packages[name]
        text += f"| {name} | {entry.registry} | {entry.version} | {entry.license} | {entry.note} |\n"
    return text


def build(out: Path, work: Path) -> None:
    """Write shards, cards, licences and README."""
    tree = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    packages = {entry["package"]: Package(**entry) for entry in tree["packages"]}
    domains = [PromptDomain(**{**entry, "parts": tuple(entry["parts"])}) for entry in tree["domains"]]
    work.mkdir(parents=True, exist_ok=True)
    archives = {name: fetch(package, work, sys.executable) for name, package in packages.items()}
    sides = {}
    for domain in domains:
        pairs = read_pairs(domain, archives)
        sides[domain.name] = split(pairs, domain.name, domain.most_bytes)
        (out / domain.name).mkdir(parents=True, exist_ok=True)
        for side, kept in sides[domain.name].items():
            (out / domain.name / f"{side}-000000.jsonl").write_text(as_lines(kept), encoding="utf-8")
            print(f"{domain.name:12}{side:10}{len(kept):5} of {len(pairs)} pairs", flush=True)
        (out / f"{domain.name}.yaml").write_text(card(domain, packages), encoding="utf-8")
    used = {name: package for name, package in packages.items() if name != LICENCE_TEXTS}
    write_licenses(out, used, archives, archives[LICENCE_TEXTS], {})
    (out / "README.md").write_text(readme(domains, packages, sides), encoding="utf-8")


def main() -> int:
    """Parse the command line, build, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for cards and shards")
    parser.add_argument("--work", type=Path, default=Path(".cache/domain-packages"), help="downloads")
    arguments = parser.parse_args()
    try:
        build(arguments.out, arguments.work.resolve())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
