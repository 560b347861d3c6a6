"""Secrets in what a command shows of requests and answers."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

import httpx
import msgspec

from adapter.plugin import Secret

MASK = "***"
# The value of any other header may be a credential.
_SHOWN_HEADERS = frozenset(
    {"accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "date", "host",
     "idempotency-key", "location", "retry-after", "server", "transfer-encoding", "user-agent"}
)  # fmt: skip
_NAME = r"[\w.-]*(?:token|secret|passw|signature|credential|assertion|api[_-]?key|authorization)[\w.-]*"
# Values under such names, in JSON and in forms or queries: no setting has the token that an answer brings.
_IN_JSON = re.compile(rf'("{_NAME}"\s*:\s*)("(?:[^"\\]|\\.)*"|[^\s,{{}}\[\]"]+)', re.IGNORECASE)
_IN_FORM = re.compile(rf"(?<![\w.-])({_NAME}=)[^&\s]+", re.IGNORECASE)


class Masker:
    """A function that masks secrets in a text.

    Masked are these values in every spelling, and each value under the name of a secret.
    """

    def __init__(self, secrets: Iterable[Secret]) -> None:
        values = {each.reveal() for each in secrets}
        spellings = (str, lambda value: json.dumps(value)[1:-1], quote_plus, lambda value: quote(value, safe=""))
        spelt = {spelling(value) for value in values for spelling in spellings}
        self._spelt = sorted(spelt - {""}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for value in self._spelt:
            text = text.replace(value, MASK)
        return _IN_FORM.sub(rf"\g<1>{MASK}", _IN_JSON.sub(rf'\g<1>"{MASK}"', text))


def secrets_in(value: Any) -> Iterator[Secret]:
    """Yield every secret inside settings, at any depth."""
    if isinstance(value, Secret):
        yield value
    elif isinstance(value, msgspec.Struct):
        yield from secrets_in([getattr(value, name) for name in value.__struct_fields__])
    elif isinstance(value, Mapping):
        yield from secrets_in(list(value.values()))
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from secrets_in(each)


def message_lines(headers: httpx.Headers, content: bytes) -> Iterator[str]:
    """Yield the lines that show the headers and the body of a request or an answer."""
    for name, value in headers.items():
        yield f"    {name}: {value if name in _SHOWN_HEADERS else MASK}"
    try:
        text = json.dumps(json.loads(content), indent=2, ensure_ascii=False)
    except ValueError:
        text = content.decode(errors="replace")
    yield from (f"    {line}" for line in text.splitlines())
