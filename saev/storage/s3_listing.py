"""Listings of buckets, page by page, in constant memory.

s3fs keeps the whole listing as nested dictionaries, which takes about 2 kB and 0.1 ms per object.
Here each page is parsed as it arrives, and nothing is kept.
"""

import http.client
import socket
import typing as tp
import urllib.parse
import xml.parsers.expat
from collections.abc import Iterator

from saev.storage import answers
from saev.storage.faults import retry
from saev.storage.s3 import Bucket

Row = dict[str, tp.Any]
"""One object as s3fs describes it: "Key", "size" in bytes, "ETag", "LastModified"."""
_FIELDS = {"Key", "Size", "ETag", "LastModified"}
_QUERY = {"encoding-type": "url", "list-type": "2"}


class Page(tp.NamedTuple):
    """One answer to ListObjectsV2."""

    rows: list[Row]
    token: str
    """The continuation token of the next page; "" on the last page."""


def objects(bucket: Bucket, prefix: str) -> Iterator[Row] | None:
    """All objects whose keys begin with a prefix, in order; None if s3fs has to list them.

    Raises:
        OSError: the store refuses the request or does not answer.
    """
    first = _page(bucket, prefix, "")
    return None if first is None else _rows(bucket, prefix, first)


def _rows(bucket: Bucket, prefix: str, page: Page | None) -> Iterator[Row]:
    while page is not None:
        yield from page.rows
        page = _page(bucket, prefix, page.token) if page.token else None


@retry
def _page(bucket: Bucket, prefix: str, token: str) -> Page | None:
    """One page; None if the store redirects to another region, which s3fs can follow."""
    query = {**_QUERY, "prefix": prefix, **({"continuation-token": token} if token else {})}
    target = bucket.target_of_listing(query)
    try:
        with bucket.answer(target, bucket.sign(target)) as answer:
            body = answer.read()
    except (http.client.HTTPException, socket.gaierror) as err:
        raise ConnectionError(f"{type(err).__name__}: {err}") from err
    if answer.status == 200:
        return parse(body)
    region = answer.headers.get("x-amz-bucket-region", "")
    refusal = answers.parse(answer.status, body.decode(errors="replace"), "ListObjectsV2", region)
    if refusal.is_elsewhere and not token:
        return None
    raise answers.RefusedError(refusal)


def parse(body: bytes) -> Page:
    """Parse an answer's XML.

    Raises:
        OSError: it is damaged, or not a listing. The request is then sent again.
    """
    # The reader must not refer to the parser. A reference cycle would keep each page in memory
    # until Python's garbage collector runs, which is rare in a process with many objects.
    reader, parser = _Reader(), xml.parsers.expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.data
    try:
        parser.Parse(body, True)
        page = reader.page()
    except (xml.parsers.expat.ExpatError, KeyError, ValueError) as err:
        raise OSError(f"the store's listing is damaged ({type(err).__name__}: {err})") from err
    return page


class _Reader:
    """Collects the fields of a listing."""

    def __init__(self) -> None:
        self._rows: list[dict[str, str]] = []
        self._inside = False
        self._text = ""
        self._about: dict[str, str] = {}

    def start(self, name: str, _attributes: tp.Any) -> None:
        self._text = ""
        if name == "Contents":
            self._inside = True
            self._rows.append({})

    def data(self, text: str) -> None:
        self._text += text

    def end(self, name: str) -> None:
        if name == "Contents":
            self._inside = False
        elif self._inside:
            if name in _FIELDS:
                self._rows[-1][name] = self._text
        else:
            self._about[name] = self._text

    def page(self) -> Page:
        """The parsed page. Raises KeyError or ValueError if something is missing."""
        if "ListBucketResult" not in self._about:
            raise ValueError("it is no ListBucketResult")
        token = ""
        if self._about["IsTruncated"] == "true":
            token = self._about["NextContinuationToken"]
        quoted = self._about.get("EncodingType") == "url"
        rows = []
        for row in self._rows:
            key = urllib.parse.unquote_plus(row["Key"]) if quoted else row["Key"]
            rows.append(
                {
                    "Key": key,
                    "size": int(row["Size"]),
                    "ETag": row.get("ETag", ""),
                    "LastModified": row.get("LastModified"),
                }
            )
        return Page(rows, token)
