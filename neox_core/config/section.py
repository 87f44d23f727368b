"""What the sections of the configuration have in common: frozen, strict, with paths next to the YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

from neox_core.config.paths import expanded, local_path

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _local(value: object) -> object:
    return local_path(value) if isinstance(value, str) else value


def _resolve(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base", Path.cwd())
    return Path(base, path).resolve()


ConfigPath = Annotated[Path, BeforeValidator(_local), AfterValidator(_resolve)]
"""A path; a relative one is relative to the folder of the YAML file."""


def _as_submitit_names(options: dict[str, Any]) -> dict[str, Any]:
    named = {name.lstrip("-").replace("-", "_"): value for name, value in options.items()}
    if len(named) < len(options):
        raise ValueError(f"an option is given twice: {', '.join(options)}")
    return named


SbatchOptions = Annotated[dict[str, Any], AfterValidator(_as_submitit_names)]
"""Options of sbatch, as on its command line (no-requeue) or as submitit names them (no_requeue), which they become: by
another name an option would not replace ours."""


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_stray_booleans(cls, values: Any) -> Any:
        # Where another type is due, pydantic would read `steps: yes` as 1.
        switches = {name for name, field in cls.model_fields.items() if field.annotation is bool}
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name not in switches:
                raise ValueError(f"{name} is {value}: give a number, a name or a section, not yes or no")
        return values


def _as_text(location: object) -> object:
    return str(location) if isinstance(location, Path) else location


def _resolve_location(location: str, info: ValidationInfo) -> str:
    return expanded(location) if location.startswith("s3://") else str(_resolve(local_path(location), info))


Location = Annotated[str, BeforeValidator(_as_text), AfterValidator(_resolve_location)]
"""A path or glob, relative to the folder of the YAML file, or s3://bucket/prefix."""


def _expand_prefix(value: object) -> object:
    return expanded(value) if isinstance(value, str) and value.startswith("s3://") else value


S3Prefix = Annotated[str, BeforeValidator(_expand_prefix), Field(pattern=r"^s3://[A-Za-z0-9][A-Za-z0-9._-]*(/.*)?$")]
"""A folder in an object store."""
