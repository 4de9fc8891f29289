"""What the weights are offered under, and what the data's licences have to say about it: what is known, and no legal advice."""

import difflib
import re
from typing import Any, NamedTuple

from swath.shards.errors import InputError

# The identifiers that the Hub takes in a card's metadata (its documentation, "Licenses"), without those of one vendor's models.
_KNOWN = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr
lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql
unlicense wtfpl zlib
"""
IDENTIFIERS = frozenset(_KNOWN.split())


def identifier(text: str) -> str:
    """The Hub's identifier (lower case) of an SPDX identifier; InputError with the nearest where it knows none."""
    found = text.strip().lower().removesuffix("-only").removesuffix("-or-later")
    if found not in IDENTIFIERS:
        near = difflib.get_close_matches(found, sorted(IDENTIFIERS), n=1)
        raise InputError(
            f"--license {text!r} is no identifier that the Hub knows"
            f"{f'; did you mean {near[0]}?' if near else '; such as apache-2.0, cc-by-4.0, cc-by-nc-4.0, or other'}"
        )
    return found


class Terms(NamedTuple):
    """Of one licence. `known`: an identifier whose terms these are; otherwise somebody must read them."""

    known: bool
    non_commercial: bool
    no_derivatives: bool
    share_alike: bool


def terms(licence: str) -> Terms:
    """What is to be seen in a data set's licence line, such as "CC-BY-NC-4.0" or "not stated; research use"."""
    text = licence.lower()
    marks = set(re.split(r"[^a-z0-9]+", text)) if re.search(r"\bcc[ -]by\b", text) else set()
    return Terms(
        known=text.replace(" ", "-") in IDENTIFIERS - {"other", "cc"},
        non_commercial="nc" in marks or bool(re.search(r"non-?commercial|research (use|only|purposes)", text)),
        no_derivatives="nd" in marks or bool(re.search(r"no[ -]?deriv", text)),
        share_alike="sa" in marks or text in ("odbl", "cdla-sharing-1.0"),
    )


def restricts(licence: str) -> str:
    """A few words for a table: what `licence` asks of those who use weights that were trained on such data."""
    if not licence:
        return "not known: the data's owner must be asked"
    found = terms(licence)
    words = [
        words
        for holds, words in (
            (found.no_derivatives, "no redistribution of derived works"),
            (found.non_commercial, "non-commercial use only"),
            (found.share_alike, "derived works under the same licence"),
        )
        if holds
    ]
    if not found.known:
        words.append("terms of its own, to be read by who uses the weights")
    return "; ".join(words) or "nothing beyond its notice"


def concerns(weights: str, datasets: list[dict[str, Any]]) -> list[str]:
    """Lines for who publishes weights under the identifier `weights` that were trained on `datasets` ({"name", "licence"} each).

    Raises InputError where a data set forbids to pass on what is derived from it.
    """
    if not datasets:
        return ["what the weights were trained on is not recorded, so neither is the licence of the data"]
    ours, lines = terms(weights), []
    for one in datasets:
        name, licence = one["name"], one["licence"]
        found = terms(licence)
        if found.no_derivatives:
            raise InputError(f"{name} is under {licence}, which forbids to pass on derived works; these weights stay unpublished")
        if not licence:
            lines.append(f"the licence of {name} is not stated; make sure that weights trained on it may be published")
            continue
        if found.non_commercial and not ours.non_commercial:
            lines.append(f"{name} [{licence}] is for non-commercial use, which {weights} would not say; the card does")
        if found.share_alike and not ours.share_alike:
            lines.append(f"{name} [{licence}] asks for derived works under the same licence, and {weights} is another")
        if not found.known:
            lines.append(f"{name} has terms of its own [{licence}]; make sure that they let weights be published")
    return lines
