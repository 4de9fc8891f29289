"""XML of strangers: no document type, no entities, limited in size."""

from xml.etree import ElementTree
from xml.parsers import expat

from swath.shards.codec import DecodeError
from swath.shards.errors import InputError

MAX_BYTES = 1 << 24


def parse_xml(data: bytes, shown: str) -> ElementTree.Element:
    """The root. InputError for a document type, which only entities need; DecodeError for what is no XML."""
    if len(data) > MAX_BYTES:
        raise DecodeError(f"{shown}: {len(data)} bytes of XML are beyond the limit of {MAX_BYTES}")

    def refuse(*_: object) -> None:
        raise InputError(f"{shown} declares a document type, which may hold entities that expand or reach out; remove it")

    looker = expat.ParserCreate()
    looker.StartDoctypeDeclHandler = refuse
    try:
        looker.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise DecodeError(f"{shown} is no XML that can be read ({error})") from None


def local(tag: str) -> str:
    """The name of an element without its namespace."""
    return tag.rpartition("}")[2]


def texts(root: ElementTree.Element, name: str) -> list[tuple[dict[str, str], str]]:
    """(attributes, stripped text) of every element of that name, wherever it stands."""
    return [(element.attrib, (element.text or "").strip()) for element in root.iter() if local(element.tag) == name]
