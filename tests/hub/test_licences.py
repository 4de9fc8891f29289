"""What a licence line says is seen in it, however it is written."""

import pytest

from swath.hub.licences import Terms, concerns, identifier, restricts, terms
from swath.shards.errors import InputError
from swath.shards.recipes.registry import recipes


def test_identifiers_are_the_hubs() -> None:
    assert [identifier(text) for text in ("Apache-2.0", " MIT ", "GPL-3.0-or-later", "CC-BY-NC-4.0")] == [
        "apache-2.0", "mit", "gpl-3.0", "cc-by-nc-4.0",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"did you mean cc-by-sa-4\.0"):
        identifier("cc-by-sa-4")
    with pytest.raises(InputError, match=r"such as apache-2\.0"):
        identifier("")


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", Terms(True, False, False, False)),
        ("CC-BY-4.0", Terms(True, False, False, False)),
        ("CC-BY-SA-4.0", Terms(True, False, False, True)),
        ("CC BY-NC-SA 4.0", Terms(True, True, False, True)),
        ("CC-BY-NC-ND-4.0", Terms(True, True, True, False)),
        ("CC-BY-4.0; of its partner not stated", Terms(False, False, False, False)),
        ("not stated; research use", Terms(False, True, False, False)),
        ("Non-Commercial, no derivatives", Terms(False, True, True, False)),
        ("MIT (images: their owners')", Terms(False, False, False, False)),
        ("land and sand", Terms(False, False, False, False)),
        ("", Terms(False, False, False, False)),
    ],
)
def test_terms(licence: str, expected: Terms) -> None:
    assert terms(licence) == expected


def test_what_it_restricts() -> None:
    assert restricts("MIT") == "nothing beyond its notice"
    assert restricts("CC-BY-NC-SA-4.0") == "non-commercial use only; derived works under the same licence"
    assert "owner must be asked" in restricts("") and "terms of its own" in restricts("EnMAP data licence")
    assert all(restricts(recipe.licence) for recipe in recipes().values())


def test_concerns_of_one_who_publishes() -> None:
    def of(weights: str, *licences: str) -> list[str]:
        return concerns(weights, [{"name": f"d{n}", "licence": licence} for n, licence in enumerate(licences)])

    assert of("apache-2.0", "MIT", "CC-BY-4.0") == []
    assert "non-commercial" in of("mit", "CC-BY-NC-4.0")[0] and of("cc-by-nc-4.0", "CC-BY-NC-4.0") == []
    assert "same licence" in of("mit", "CC-BY-SA-4.0")[0] and of("cc-by-sa-4.0", "CC-BY-SA-4.0") == []
    assert "d1 is not stated" in of("mit", "MIT", "")[0] and "terms of its own" in of("mit", "Anything else")[0]
    assert "not recorded" in of("mit")[0]
    with pytest.raises(InputError, match=r"d0 is under CC-BY-ND-4\.0"):
        of("cc-by-nd-4.0", "CC-BY-ND-4.0")
