"""What went wrong with the object store, in one line that says where and what to do."""

from __future__ import annotations

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as EndpointConnectionError

from neox_core.config import StorageConfig
from neox_core.errors import StorageError

_WRONG_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "403", "Forbidden")


def error_code(error: ClientError) -> str:
    """S3's own name of the error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def may_pass(error: Exception) -> bool:
    """Whether a StorageError may be gone when the request is made again: it is the store's or the network's.

    Any answer of the store counts, also a refusal: keys are renewed, buckets come back, clocks are set right.
    """
    if not isinstance(error, StorageError):
        return False
    cause = error.__cause__
    if isinstance(cause, NoCredentialsError | PartialCredentialsError):
        return False
    # The client's own errors may be OSErrors and ValueErrors too; what is nothing else is about a file or an address.
    foreign = not isinstance(cause, BotoCoreError | ClientError | Boto3Error | ConnectionError | TimeoutError)
    return not (foreign and isinstance(cause, OSError | ValueError))


def explain(error: Exception, config: StorageConfig, url: str) -> str:
    """One line about an error of boto3 or of the local disk: object, endpoint, values, the way out."""
    if isinstance(error, Boto3Error) and isinstance(error.__context__, ClientError):
        error = error.__context__  # boto3 wraps what S3 said about an upload
    where = config.endpoint_url or f"AWS ({config.region})"
    return " ".join(_explain(error, where, url).split())


def _explain(error: Exception, where: str, url: str) -> str:
    bucket = url.split("/")[2]
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"no credentials for {url} at {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, EndpointConnectionError | HTTPClientError):
        return (
            f"cannot reach the object store at {where} for {url}: {error}: check storage.endpoint_url and the network"
        )
    if isinstance(error, ClientError):
        return _explain_answer(error, where, url, bucket)
    if isinstance(error, ValueError):
        return f"storage.endpoint_url {where} is not an address such as https://s3.example.org:9000 ({error})"
    if isinstance(error, OSError):
        return f"local file of {url} at {where}: {error}"
    return f"request for {url} at {where} failed: {error}"


def _explain_answer(error: ClientError, where: str, url: str, bucket: str) -> str:
    code = error_code(error)
    message = error.response.get("Error", {}).get("Message", "") or "no reason given"
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket} at {where}: create it, or correct storage.url"
    if code in _WRONG_KEYS:
        return (
            f"{where} refuses the credentials for bucket {bucket} ({code}: {message}): "
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if code == "AccessDenied":
        return (
            f"{where} denies access to {url} ({message}): "
            f"these credentials need read and write access to bucket {bucket}"
        )
    if code in ("NoSuchKey", "404"):
        return f"there is no object {url} at {where}"
    return f"{where} answers {code} to {error.operation_name} of {url}: {message}"
