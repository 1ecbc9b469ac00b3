"""Refusals of an S3 store: their explanation for users, and whether to repeat the request.

Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

import contextlib
import datetime
import http.client
import re
import typing as tp
import xml.etree.ElementTree as ET

import fsspec

from saev.storage.urls import filesystem

_PASSING = {
    "BandwidthLimitExceeded", "IncompleteBody", "InternalError", "InternalServerError",
    "OperationAborted", "RequestLimitExceeded", "RequestThrottled", "RequestTimeout",
    "ServerBusy", "ServiceUnavailable", "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling",
    "ThrottlingException", "TooManyRequests", "TooManyRequestsException", "BadDigest",
    "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
}  # fmt: skip
"""Codes after which the same request may succeed. A bit error in the network causes some of
them."""
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_UNKNOWN_KEY = ("InvalidAccessKeyId", "InvalidClientTokenId", "InvalidToken", "InvalidSecurity")
_ELSEWHERE = (
    "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect",
    "Redirect", "TemporaryRedirect", "301", "307", "308",
)  # fmt: skip
_ACTIONS = {
    "HeadObject": "s3:GetObject", "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket", "ListObjects": "s3:ListBucket", "HeadBucket": "s3:ListBucket",
    "CreateMultipartUpload": "s3:PutObject", "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject", "DeleteObjects": "s3:DeleteObject",
    "ListParts": "s3:ListMultipartUploadParts",
}  # fmt: skip
"""Permissions whose names differ from those of their operations:
https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-with-s3-policy-actions.html"""
_OPERATION_OF = {"read": "GetObject", "write": "PutObject", "create": "PutObject"}


class Answer(tp.NamedTuple):
    """A store's answer that refuses a request."""

    status: int
    """HTTP status."""
    code: str
    """Error code in the XML body; empty if there is none."""
    message: str
    operation: str = ""
    """Operation of the S3 API, such as PutObject; empty if unknown."""
    fields: tp.Mapping[str, str] = {}
    """Other fields of the body."""

    @property
    def passes(self) -> bool:
        """Whether the same request may succeed later."""
        if self.code in _PASSING:
            return True
        return self.status in (408, 429) or (self.status >= 500 and self.status not in (501, 505))

    @property
    def is_elsewhere(self) -> bool:
        """Whether the bucket is in another region."""
        return self.code in _ELSEWHERE or self.status in (301, 302, 307, 308)

    @property
    def has_expired(self) -> bool:
        """Whether the request may succeed with a new signature or new credentials."""
        return self.code in _EXPIRED or self.code == "RequestTimeTooSkewed"

    def __str__(self) -> str:
        reason = self.code or http.client.responses.get(self.status, "")
        return f"{self.status} {reason}".strip() if self.code != str(self.status) else self.code


def parse(status: int, body: str, operation: str, region: str) -> Answer:
    """Parse the answer to a request that saev itself sent."""
    fields = {}
    with contextlib.suppress(ET.ParseError):
        fields = {e.tag.rpartition("}")[2]: e.text or "" for e in ET.fromstring(body)}
    code, message = fields.pop("Code", ""), fields.pop("Message", "")
    if not code and body and "<" not in body:
        message = body[:200]
    return Answer(status, code, message, operation, fields | ({"Region": region} if region else {}))


def of_client_error(err: tp.Any) -> Answer:
    """The answer inside botocore's ClientError."""
    response = err.response
    fields = {key: str(value) for key, value in response.get("Error", {}).items()}
    metadata = response.get("ResponseMetadata", {})
    code, message = fields.pop("Code", ""), fields.pop("Message", "")
    region = metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region")
    status = int(metadata.get("HTTPStatusCode") or (code if code.isdigit() else 0))
    if code.isdigit():  # an answer without a body
        code = ""
    if region:
        fields.setdefault("Region", region)
    return Answer(status, code, message, err.operation_name or "", fields)


class RefusedError(OSError):
    """A store refused a request that saev itself sent, without botocore."""

    def __init__(self, answer: Answer):
        super().__init__(str(answer))
        self.answer = answer


# --- Explanations ------------------------------------------------------------------------------


def explanation(answer: Answer, url: str, doing: str) -> str:
    """The reason and the remedy, as the end of a sentence `Cannot … s3://…: `."""
    if not answer.code and answer.status in (400, 403):
        answer = _ask_for_code(answer, url)
    bucket = url.partition("://")[2].partition("/")[0]
    if answer.code == "NoSuchBucket" or (answer.status, answer.operation) == (404, "HeadBucket"):
        return (
            f"there is no bucket {bucket}{endpoint(url)} ({answer}). Create it, or check its name "
            "and the endpoint (AWS_ENDPOINT_URL)."
        )
    if answer.status == 404:
        named = "" if answer.code in ("", "NoSuchKey") else f" ({answer})"
        return f"it does not exist{named}. Check the path."
    about_credentials = _of_credentials(answer, url)
    if about_credentials:
        return about_credentials
    if answer.is_elsewhere:
        return _elsewhere(answer, url, bucket)
    if answer.status in (401, 403):
        return _denied(answer, url, doing)
    return _of_the_store(answer, url, bucket)


def _of_credentials(answer: Answer, url: str) -> str:
    """Explanation if the credentials or the clock are wrong, else empty."""
    if answer.code in _EXPIRED:
        return (
            f"the credentials{_key_id(answer, url)} have expired ({answer}). Get new ones "
            "(AWS_SESSION_TOKEN and its keys, `aws sso login`, the role of the pod) and run the "
            "same command again; finished work is kept."
        )
    if answer.code in _UNKNOWN_KEY:
        return (
            f"the store{endpoint(url)} does not know access key{_key_id(answer, url)} ({answer}). "
            "Check AWS_ACCESS_KEY_ID, AWS_SESSION_TOKEN, AWS_PROFILE and the endpoint."
        )
    if answer.code == "SignatureDoesNotMatch":
        return (
            f"the signature is wrong ({answer}): the secret key is not that of access key"
            f"{_key_id(answer, url)}, or a proxy on the way changes requests. Check "
            "AWS_SECRET_ACCESS_KEY."
        )
    if answer.code == "RequestTimeTooSkewed":
        return (
            f"this machine's clock differs from the store's{_skew(answer)} ({answer}). Set "
            "this machine's clock, for instance by NTP."
        )
    return ""


def _of_the_store(answer: Answer, url: str, bucket: str) -> str:
    at = endpoint(url)
    if answer.passes:
        return (
            f"the store{at} is down or overloaded ({answer}{_says(answer)}). Check its state, and "
            "run the same command again; finished work is kept."
        )
    if answer.code == "InvalidBucketName":
        return f"{bucket} cannot be the name of a bucket ({answer}). Check the path."
    if answer.status == 405:
        return f"the store{at} does not allow this ({answer}); it may be read-only. Check the path."
    if answer.status == 507 or answer.code in ("QuotaExceeded", "XMinioStorageFull"):
        return f"the store{at} is full ({answer}). Free some space."
    if answer.status == 400 and "HTTPS" in answer.message.upper() and not answer.code:
        return f"the endpoint{at} speaks TLS only. Use https:// in AWS_ENDPOINT_URL."
    return f"the store{at} answered {answer}{_says(answer)}."


def _denied(answer: Answer, url: str, doing: str) -> str:
    operation = answer.operation or _OPERATION_OF.get(doing, "")
    said = re.search(r"perform:? (s3:\w+|kms:\w+)", answer.message)
    action = said[1] if said else _ACTIONS.get(operation, f"s3:{operation}" if operation else "")
    what = url.partition("://")[2]
    resource = what.partition("/")[0] if action == "s3:ListBucket" else what
    hint = ""
    if action == "s3:GetObject":
        hint = (
            " It may also not exist: without the permission s3:ListBucket, the store gives the "
            "same answer to that."
        )
    missing = f"the permission {action}" if action else "a permission"
    return (
        f"permission denied ({answer}): access key{_key_id(answer, url) or ' (none)'} lacks "
        f"{missing} on arn:aws:s3:::{resource}. Add it to the policy of the user, the role or the "
        f"bucket, or use other credentials.{hint}"
    )


def _elsewhere(answer: Answer, url: str, bucket: str) -> str:
    found = re.search(r"expecting '([\w-]+)'", answer.message)
    region = answer.fields.get("Region") or (found[1] if found else "")
    place = f"bucket {bucket} is in {f'region {region}' if region else 'another region'}"
    remedy = f"AWS_DEFAULT_REGION={region}" if region else "AWS_DEFAULT_REGION to its region"
    asked = _client_setting(url, "region_name")
    return (
        f"{place}{f', {asked} was asked' if asked else ''} ({answer}). Set {remedy}, and check "
        "AWS_ENDPOINT_URL."
    )


def endpoint(url: str) -> str:
    """The text " at ENDPOINT" for messages about a URL; empty if the endpoint is not known."""
    found = _client_setting(url, "endpoint_url")
    return f" at {found}" if found else ""


def _client_setting(url: str, name: str) -> str:
    """A setting of the file system's S3 client; empty if there is no client."""
    with contextlib.suppress(Exception):
        fs: tp.Any = filesystem(url)[0]
        return str(getattr(fs.s3.meta, name) or "")
    return ""


def _key_id(answer: Answer, url: str) -> str:
    """The access key ID (which is not secret) with a leading space; empty if it is not known."""
    key = answer.fields.get("AWSAccessKeyId") or _own_key_id(url)
    return f" {key}" if key else ""


def _own_key_id(url: str) -> str:
    with contextlib.suppress(Exception):
        fs: tp.Any = filesystem(url)[0]
        if fs.key:
            return str(fs.key)
        found = fsspec.asyn.sync(fs.loop, fs.session.get_credentials)
        return str(found.access_key) if found else ""
    return ""


def _skew(answer: Answer) -> str:
    with contextlib.suppress(KeyError, ValueError):
        server = datetime.datetime.fromisoformat(answer.fields["ServerTime"])
        ours = answer.fields["RequestTime"]
        sent = datetime.datetime.strptime(ours, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
        seconds = (sent - server).total_seconds()
        return f" by {abs(seconds):.0f} s: it is {'ahead' if seconds > 0 else 'behind'}"
    return ""


def _says(answer: Answer) -> str:
    return f": {answer.message.strip().rstrip('.')}" if answer.message.strip() else ""


def _ask_for_code(answer: Answer, url: str) -> Answer:
    """The same refusal with its code: repeats a HEAD as a GET, whose answer has a body."""
    from botocore.exceptions import ClientError

    fs: tp.Any
    fs, path = filesystem(url)
    bucket, key, _ = fs.split_path(path)
    try:
        if key and answer.operation != "HeadBucket":
            fs.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
        else:
            fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except Exception as err:
        cause = err if isinstance(err, ClientError) else err.__cause__
        if isinstance(cause, ClientError):
            found = of_client_error(cause)
            return found if found.status in (400, 403) else answer
    return answer
