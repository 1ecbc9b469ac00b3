"""Writing objects to S3. After a success, the object holds exactly the bytes that were written.

A small object is one PUT. A larger one is a multipart upload, which becomes an object when it is
completed. Every attempt is a new upload, each part number is sent with one content only, and the
completion is sent only after all parts. So a completion publishes all bytes of its attempt or
nothing, even if the network loses, delays, repeats or reorders requests. The answer to a completion
may be lost too, so the object is compared afterwards.
"""

import base64
import contextlib
import hashlib
import io
import time
import typing as tp

from saev.errors import StorageError
from saev.storage.checksums import crc32c
from saev.storage.faults import answer_of, is_passing, retry
from saev.storage.waiting import Patience, limited

PART_BYTES = 32 << 20
_PARTS_OF_A_SIZE = 1000
"""The part size doubles after this number of parts, because 5 TiB must fit into 10,000 parts."""
_ABORT_S = 2.0
"""Seconds of silence allowed for an abort. It is short, because the store itself may be down."""


class Upload(io.RawIOBase):
    """A new object, written from front to back.

    Args:
        fs: an s3fs file system.
        key: bucket and key.
        url: for messages.
    """

    def __init__(self, fs: tp.Any, key: str, url: str):
        self._fs, self._key, self._url = fs, key, url
        bucket, name, _ = fs.split_path(key)
        self._place = {"Bucket": bucket, "Key": name}
        self._buffer = bytearray()
        self._size = 0
        self._crc = 0
        self._upload_id = ""
        self._parts: list[dict[str, tp.Any]] = []
        self._digests = b""

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def write(self, data: tp.Any) -> int:
        """Append bytes. Full parts are sent at once."""
        if self.closed:
            raise ValueError(f"{self._url} is closed and cannot be written to")
        view = memoryview(data).cast("B")
        self._crc = crc32c(view, self._crc)
        self._size += view.nbytes
        start = 0
        while start < view.nbytes:
            n = self._part_bytes()
            end = start + n - len(self._buffer)
            self._buffer += view[start:end]
            start = end
            if len(self._buffer) == n:
                self._send_part()
        return view.nbytes

    def publish(self) -> None:
        """Complete the upload and check the object.

        Raises:
            StorageError: the object is missing or holds other bytes.
        """
        if not self._parts:
            self._call("put_object", Body=bytes(self._buffer), ContentMD5=_md5(self._buffer))
        else:
            if self._buffer:
                self._send_part()
            failure = self._complete()
            if failure:
                raise self._not_published(failure)
        self._fs.invalidate_cache(self._key)
        self.close()

    def drop(self) -> None:
        """Abort the upload and delete what was sent of it, if the store can be reached."""
        self._buffer = bytearray()
        self.close()
        if self._upload_id:
            limit = Patience(_ABORT_S, since=time.monotonic())
            with contextlib.suppress(Exception), limited(limit):
                self._fs.call_s3("abort_multipart_upload", **self._place, UploadId=self._upload_id)

    def _part_bytes(self) -> int:
        if self._fs.fixed_upload_size:
            return PART_BYTES
        return int(PART_BYTES << (len(self._parts) // _PARTS_OF_A_SIZE))

    def _send_part(self) -> None:
        if not self._upload_id:
            self._upload_id = self._call("create_multipart_upload")["UploadId"]
        number = len(self._parts) + 1
        # The store refuses a part whose bytes changed on the way.
        sent = self._call(
            "upload_part",
            UploadId=self._upload_id,
            PartNumber=number,
            Body=bytes(self._buffer),
            ContentMD5=_md5(self._buffer),
        )
        self._digests += hashlib.md5(self._buffer, usedforsecurity=False).digest()
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        self._buffer = bytearray()

    @retry
    def _complete(self) -> str:
        """Complete the upload; repeat the request if its answer is lost. Returns why the object is
        not published, or ""."""
        try:
            answer = self._fs.call_s3(
                "complete_multipart_upload",
                **self._place,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": self._parts},
            )
        except Exception as err:
            refusal = answer_of(err)
            is_gone = refusal is not None and refusal.code == "NoSuchUpload"
            if not is_gone and not is_passing(err):
                raise
            # The completion may have succeeded although its answer was lost.
            if self._is_published(""):
                return ""
            if is_gone:
                return "the store does not know the upload any more"
            raise
        if self._is_published(answer.get("ETag", "")):
            return ""
        return "the store reported success, but it holds something else"

    def _is_published(self, etag: str) -> bool:
        """Whether the object holds the bytes that were written.

        First the entity tag is compared. Most stores compute it from the MD5 of all parts, or name
        it in the answer to the completion. If the tag differs, the object is read and compared.
        """
        try:
            found = self._fs.call_s3("head_object", **self._place)
        except FileNotFoundError:
            return False
        if found["ContentLength"] != self._size:
            return False
        md5 = hashlib.md5(self._digests, usedforsecurity=False).hexdigest()
        tags = {f"{md5}-{len(self._parts)}", etag.strip('"')} - {""}
        if found.get("ETag", "").strip('"') in tags:
            return True
        crc = 0
        for start in range(0, self._size, PART_BYTES):
            end = min(start + PART_BYTES, self._size)
            crc = crc32c(retry(self._fs.cat_file)(self._key, start=start, end=end), crc)
        return crc == self._crc

    def _not_published(self, why: str) -> StorageError:
        error = StorageError(
            f"Cannot write {self._url}: it was not published as it was written ({why}). Another "
            "process may write the same object, or a rule of the bucket ends uploads. Run the same "
            "command again; finished work is kept."
        )
        error.passing = True
        return error

    def _call(self, method: str, **kwargs: tp.Any) -> tp.Any:
        return retry(self._fs.call_s3)(method, **self._place, **kwargs)


def _md5(data: tp.Any) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
