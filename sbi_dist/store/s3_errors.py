"""Refusals of an S3 server, and of its client's configuration, as sentences for the user.

Failures that pass are told in :mod:`sbi_dist.store.s3_retry`. No sentence holds a credential: the
server's own words are shown only for codes that are not about credentials, and redacted.
"""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
from typing import Any

from sbi_dist.errors import InputError
from sbi_dist.progress import duration
from sbi_dist.store.s3_client import Link
from sbi_dist.store.s3_retry import reason

__all__ = ["Request", "configuration_refusal", "refusal"]

_SOURCES = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile that AWS_PROFILE names), on "
    "every machine that uses the store"
)
_WRONG_KEYS = {
    "InvalidAccessKeyId": "the server does not know the access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "InvalidSecurity": "the server does not accept the key",
    "InvalidToken": "the session token is not valid",
    "AuthFailure": "the server does not accept the key",
    "NotSignedUp": "the server does not accept the key",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_OTHER_REGION = {
    "301",
    "307",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
    "PermanentRedirect",
    "TemporaryRedirect",
}
_DENIED = {"403", "401", "AccessDenied", "AllAccessDisabled", "AccountProblem", "Unauthorized"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked of a store.

    Attributes:
        uri: the store.
        bucket: its bucket.
        act: ``read``, ``write``, ``list`` or ``delete``.
        key: the object, or the prefix of a listing; may be empty.
    """

    uri: str
    bucket: str
    act: str
    key: str = ""

    @property
    def failure(self) -> str:
        """Such as ``a/b can't be written``."""
        done = {"read": "read", "write": "written", "list": "listed", "delete": "deleted"}
        return f"{self.key or 'it'} can't be {done[self.act]}"

    @property
    def permission(self) -> str:
        needed = {"read": "s3:GetObject", "write": "s3:PutObject", "delete": "s3:DeleteObject"}
        return needed.get(self.act, "s3:ListBucket")


def refusal(error: BaseException, request: Request, link: Link, readable: bool) -> InputError:
    """The sentence for a failure that will not pass.

    Args:
        error: what boto3 raised.
        request: what was asked.
        link: to which server.
        readable: whether the same key is known to be allowed to read.
    """
    from botocore.exceptions import ClientError, SSLError

    start = f"store {request.uri}: {request.failure}"
    if isinstance(error, ClientError):
        return InputError(f"{start}, {_server_words(error, request, link, readable)}")
    if isinstance(error, SSLError):
        return InputError(
            f"{start}, as TLS to {link.endpoint} fails ({_certificate_words(error)}); give the "
            "authority's certificates in AWS_CA_BUNDLE, or the right URL in AWS_ENDPOINT_URL_S3"
        )
    return InputError(f"{start}, {configuration_refusal(error)}")


def _server_words(error: Any, request: Request, link: Link, readable: bool) -> str:
    answer = error.response
    found = answer.get("Error", {})
    metadata = answer.get("ResponseMetadata", {})
    code, status = str(found.get("Code", "")), metadata.get("HTTPStatusCode", 0)
    headers = metadata.get("HTTPHeaders", {})
    bucket = request.bucket
    if code in _WRONG_KEYS:
        return f"as {_WRONG_KEYS[code]} ({code} from {link.endpoint}); check {_SOURCES}"
    if code in _EXPIRED:
        return (
            f"as the credentials have expired ({code}); get new ones (with AWS_SESSION_TOKEN "
            "where they have one) and run the command again, which goes on from what is stored"
        )
    if code == "RequestTimeTooSkewed":
        return (
            f"as this machine's clock is wrong ({code}{_clock_words(found, headers)}); set the "
            "clock and run the command again"
        )
    if code == "NoSuchBucket":
        return (
            f"as there is no bucket {bucket!r} at {link.endpoint}; create it, or correct the "
            "store or AWS_ENDPOINT_URL_S3"
        )
    if code == "InvalidBucketName":
        return f"as the server does not take {bucket!r} as a bucket's name; give another one"
    region = headers.get("x-amz-bucket-region") or found.get("Region")
    if code in _OTHER_REGION or (region and status in (301, 307, 400)):
        right = region or "the bucket's own"
        used = link.client.meta.region_name
        return (
            f"as bucket {bucket!r} is not in region {used} ({code}); set AWS_REGION to {right}"
            f"{'' if region else ' region, or AWS_ENDPOINT_URL_S3 to its server'}"
        )
    if code in _DENIED:
        if request.act == "read":
            more = " (and s3:ListBucket, as a missing object is refused without it)"
        else:
            more = ""
        if request.act in ("write", "delete") and readable:
            who = f"as the key in use may read but not {request.act}"
        else:
            who = f"as the key in use may not {request.act}"
        shown = "AccessDenied" if code.isdigit() else code
        return (
            f"{who} ({shown}); it needs {request.permission} on bucket {bucket!r}{more}, or give "
            "another key or store"
        )
    if status == 501 or code == "NotImplemented":
        return (
            f"as {link.endpoint} lacks a feature that was used ({code}); with a server that knows "
            "no checksums, set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
        )
    words = " ".join(link.redact(str(found.get("Message", ""))).split())[:200]
    about = f"{code}, HTTP status {status}{': ' if words else ''}{words}"
    return f"as {link.endpoint} refuses it ({about}); check the store and AWS_ENDPOINT_URL_S3"


def _clock_words(found: dict[str, Any], headers: dict[str, str]) -> str:
    now = datetime.datetime.now(datetime.UTC)
    for text, parse in (
        (found.get("ServerTime"), datetime.datetime.fromisoformat),
        (headers.get("date"), email.utils.parsedate_to_datetime),
    ):
        try:
            behind = (parse(str(text)) - now).total_seconds()
        except (TypeError, ValueError):
            continue
        way = "behind" if behind > 0 else "ahead of"
        return f", {duration(abs(behind))} {way} the server's"
    return ""


def _certificate_words(error: BaseException) -> str:
    words = str(error)
    if "WRONG_VERSION_NUMBER" in words.upper():
        return "the server does not speak it there; is the URL one with http?"
    known = "certificate verify failed"
    return words[words.index(known) :].split(" (_ssl")[0] if known in words else reason(error)


def configuration_refusal(error: BaseException) -> InputError:
    """The sentence for credentials or settings of this machine that boto3 can't use."""
    from botocore import exceptions

    kind = type(error).__name__
    if isinstance(error, exceptions.NoCredentialsError):
        return InputError(f"no S3 credentials are set; set {_SOURCES}")
    if isinstance(error, exceptions.PartialCredentialsError):
        return InputError(f"the S3 credentials are incomplete; set both {_SOURCES}")
    if isinstance(error, exceptions.ProfileNotFound):
        return InputError(f"{error}; correct AWS_PROFILE, or unset it")
    if isinstance(error, exceptions.UnauthorizedSSOTokenError | exceptions.SSOError):
        return InputError(f"the sign-in has expired ({kind}); sign in again with `aws sso login`")
    if isinstance(error, exceptions.CredentialRetrievalError | exceptions.TokenRetrievalError):
        # Its words may be the output of the program that gives the credentials.
        return InputError(f"the profile's credentials can't be had ({kind}); check the profile")
    if isinstance(error, exceptions.LoginError):
        return InputError(f"the sign-in can't be used ({kind}); sign in again with `aws login`")
    words = " ".join(str(error).split())[:200]
    return InputError(
        f"the S3 settings can't be used ({words}); check AWS_ENDPOINT_URL_S3, AWS_REGION and the "
        "profile"
    )
