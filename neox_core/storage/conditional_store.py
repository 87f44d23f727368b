"""Small objects that are replaced only by who knows what they hold: what a lease is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from neox_core.storage.errors import error_code
from neox_core.storage.patient_store import PatientStore

_CHANGED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "404")
"""Answers to a conditional PUT whose condition does not hold."""


class ConditionsUnknown(Exception):
    """The server refuses conditions."""


@dataclass(frozen=True)
class VersionedText:
    """A small object, and what tells it from others of its key."""

    text: str
    etag: str


class ConditionalStore(PatientStore):
    """A patient store that can compare and set. What it needs of the server are If-Match and If-None-Match for PUT."""

    def read(self, key: str) -> VersionedText | None:
        """A small object; None if there is none."""
        found = self._patiently(key, lambda: self._text_and_etag(key))
        return found and VersionedText(*found)

    def replace(self, key: str, text: str, etag: str | None) -> str | None:
        """Write a small object if the present one has this ETag, or if there is none and `etag` is None.

        Returns:
            The new ETag; None: the present one is another, or a request whose answer was lost has written this text.
        """
        if etag is None:
            return self._patiently(key, lambda: self._put(key, text, {"IfNoneMatch": "*"}))
        # Ceph 16 wants the ETag without the quotes that it gives it; a form that is not wanted never matches.
        bare = self._patiently(key, lambda: self._put(key, text, {"IfMatch": etag.strip('"')}))
        return bare or self._patiently(key, lambda: self._put(key, text, {"IfMatch": etag}))

    def overwrite(self, key: str, text: str) -> str:
        """Write a small object whatever is there. Returns its ETag."""
        etag = self._patiently(key, lambda: self._put(key, text, {}))
        assert etag is not None
        return etag

    def is_conditional(self, key: str) -> bool:
        """Whether the server keeps to conditions, tried with an object of this key, which nobody else uses.

        A server that only knows If-None-Match is taken for one that does not: nothing says that it is atomic.
        """
        try:
            first = self.replace(key, "1", None)
            second = first and self.replace(key, "2", first)
            return bool(second) and self.replace(key, "3", first) is None
        except ConditionsUnknown:
            return False
        finally:
            self.delete([key])

    def _put(self, key: str, text: str, condition: Any) -> str | None:
        with self._errors(key):
            try:
                answer = self._client.put_object(
                    Bucket=self.bucket, Key=self.full_key(key), Body=text.encode(), **condition
                )
            except ClientError as error:
                if condition and error_code(error) in _CHANGED:
                    return None
                if condition and error_code(error) == "NotImplemented":
                    raise ConditionsUnknown from error
                raise
            return answer["ETag"]
