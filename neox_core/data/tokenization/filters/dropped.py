"""Which documents are left out: duplicates, training texts that are in a validation split, and overlaps."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from neox_core.config import DataConfig
from neox_core.data.tokenization.filters.duplicates import find_duplicates
from neox_core.data.tokenization.filters.near_duplicates import find_near_duplicates
from neox_core.data.tokenization.merge import Mask
from neox_core.data.tokenization.part_files import PartPaths, load_signatures, load_table
from neox_core.data.tokenization.part_settings import PartRecord
from neox_core.data.tokenization.readers import InputFile

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class MadePart:
    """An input file and its part."""

    file: InputFile
    record: PartRecord
    paths: PartPaths

    def overlaps(self) -> Iterable[dict[str, Any]]:
        """The lines of the part's list of overlaps."""
        with self.paths.overlaps.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


class ValidationTexts(NamedTuple):
    """Which documents of a part are in a validation split, [documents] each; none of one that is no training text."""

    equal: Mask
    near: Mask
    """Nearly equal; none if near-duplicates are not looked for."""


def find_in_validation(parts: Sequence[MadePart], data: DataConfig) -> list[ValidationTexts]:
    """For each part, which of its documents equal or nearly equal a validation document, of whatever source."""
    validation, training = ([p for p in parts if p.file.split == split] for split in (VALIDATION, TRAIN))
    found = {part.paths: ValidationTexts(_none(part), _none(part)) for part in parts}
    if validation and training:
        both, references = [*validation, *training], len(validation)
        equal = find_duplicates([partial(load_table, part.paths) for part in both], references)
        near = [_none(part) for part in both]
        if data.near_duplicates is not None:
            signatures = [partial(load_signatures, part.paths) for part in both]
            near = find_near_duplicates(signatures, data.near_duplicates, references)
        for part, same, similar in zip(both, equal, near, strict=True):
            found[part.paths] = ValidationTexts(same, similar & ~same)
    return [found[part.paths] for part in parts]


def find_dropped(
    parts: Sequence[MadePart], data: DataConfig, in_validation: Sequence[ValidationTexts]
) -> list[dict[str, Mask]]:
    """For each part, why which of its documents are left out: a reason of LEFT_OUT and a mask [documents] each."""
    dropped: list[dict[str, Mask]] = [{} for _ in parts]
    if data.deduplicate:
        for places in _compared(parts, data).values():
            masks = find_duplicates([partial(load_table, parts[place].paths) for place in places])
            for place, mask in zip(places, masks, strict=True):
                dropped[place]["duplicates"] = mask
    if data.near_duplicates is not None:
        for (_, split), places in _compared(parts, data).items():
            if split == TRAIN:
                signatures = [partial(load_signatures, parts[place].paths) for place in places]
                for place, mask in zip(places, find_near_duplicates(signatures, data.near_duplicates), strict=True):
                    dropped[place]["near_duplicates"] = mask
    for part, reasons, texts in zip(parts, dropped, in_validation, strict=True):
        if data.drop_validation_duplicates:
            reasons["in_validation"] = texts.equal | texts.near
        if data.decontaminate:
            reasons["decontaminated"] = _overlapping(part)
    return dropped


def _compared(parts: Sequence[MadePart], data: DataConfig) -> dict[tuple[str, str], list[int]]:
    """The parts, by their places, that are looked through for duplicates together."""
    groups = defaultdict[tuple[str, str], list[int]](list)
    for place, part in enumerate(parts):
        together = data.deduplicate_across and part.file.split == TRAIN
        groups["" if together else part.file.source, part.file.split].append(place)
    return groups


def _overlapping(part: MadePart) -> Mask:
    mask = _none(part)
    mask[[line["document"] for line in part.overlaps()]] = True
    return mask


def _none(part: MadePart) -> Mask:
    return np.zeros(part.record.documents, dtype=np.bool_)
