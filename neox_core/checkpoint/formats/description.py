"""What descriptions of architectures say: values of the type that is due, and one line about those that are not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from neox_core.errors import CheckpointError


@dataclass(frozen=True)
class Values:
    """A description's values by key. Nothing is turned into another type: a number in quotes is text.

    Every method raises CheckpointError, which names the file, the key and the value.
    """

    path: str
    content: Mapping[str, Any]

    def whole(self, key: str, default: int | None = None, nullable: bool = False, least: int = 1) -> int:
        """A whole number; `nullable`: null counts as absent."""
        value = self._value(key, default, nullable)
        if type(value) is not int or value < least:
            raise self.wrong(key, f"a whole number from {least}")
        return value

    def number(self, key: str, default: float | None = None, nullable: bool = False) -> float:
        """A number above 0."""
        value = self._value(key, default, nullable)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.wrong(key, "a number above 0, without quotes")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._value(key, default, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def section(self, key: str) -> Values:
        """A nested description; empty where it is absent or null."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, 'an object such as {"rope_type": "linear", "factor": 2.0}')
        return Values(f"{self.path}: {key}", value or {})

    def check_known(self, known: frozenset[str]) -> None:
        """Refuse what may change the computation: any other key that is set to more than null, false or nothing."""
        for key, value in self.content.items():
            if key not in known and not key.startswith("_") and value not in (None, False, "", [], {}):
                raise self.unknown(key)

    def unknown(self, key: str) -> CheckpointError:
        """The error about a key that may change the computation."""
        return CheckpointError(
            f"{self.path}: {key} is {shown(self.content[key])}, which is not known here: the weights may compute "
            "something else with it. Remove it if it does not change what the model computes"
        )

    def wrong(self, key: str, due: str) -> CheckpointError:
        """The error about a value of the wrong kind."""
        return CheckpointError(f"{self.path}: {key} is {shown(self.content.get(key))}: give {due}")

    def _value(self, key: str, default: Any, nullable: bool) -> Any:
        if key not in self.content or (nullable and self.content[key] is None):
            if default is None:
                raise CheckpointError(f"{self.path} lacks {key!r}")
            return default
        return self.content[key]


def shown(value: Any) -> str:
    """As the file has it, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def described_by(path: str) -> Iterator[None]:
    """Turn what is wrong with an architecture's values, as they are read from `path`, into CheckpointError."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        said = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix of our own checks
        raise CheckpointError(f"{path}: {' '.join(('.'.join(map(str, problem['loc'])), said)).strip()}") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"{path} has a value of the wrong kind: {error}") from None
