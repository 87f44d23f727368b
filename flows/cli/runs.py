"""`llemma run`: the whole chain, or stages of it, here and now."""

from __future__ import annotations

import difflib
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows.cli.options import ConfigArgument, SetOption
from flows.cli.printing import bar, print_records, print_rows
from neox_core.errors import ConfigError

_STAGES_HELP = "prepare-data, convert, train, evaluate, export; none: all of them, and the report."
_FORCE_HELP = "Make the stages again, though they are finished; training goes on from its checkpoints."


def run(
    config: ConfigArgument,
    stages: Annotated[list[str] | None, typer.Argument(metavar="STAGE", help=_STAGES_HELP)] = None,
    overrides: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help=_FORCE_HELP)] = False,
) -> None:
    """Run the whole chain, or some of its stages, here and now; finished stages are skipped."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if stages:
            _run_stages(config, _checked(stages), overrides or [], force)
        else:
            _run_chain(config, overrides or [], force)
    except KeyboardInterrupt as error:
        line = "interrupted: what is finished or saved stays, and the same command goes on from there"
        Console(stderr=True, soft_wrap=True).print(line)
        number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from None  # as shells have it
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM has come, and ends the command as Ctrl-C does."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _checked(stages: Sequence[str]) -> list[str]:
    from tasks.identity.specs import STAGES

    for name in stages:
        if name not in STAGES:
            nearest = difflib.get_close_matches(name, STAGES, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(STAGES)}"
            raise ConfigError(f"unknown stage {name!r}: {hint}")
    return [name for name in STAGES if name in stages]


def _run_stages(config: Path, names: Sequence[str], overrides: Sequence[str], force: bool) -> None:
    """One after the other, without Prefect."""
    from flows.stages import STAGE, forget_stage, how_it_went, opened_run
    from tasks.identity.specs import CONVERT, PREPARE_DATA

    with opened_run(str(config), overrides, names) as run:
        for name in names:
            if run.training is None and name not in (PREPARE_DATA, CONVERT):
                run = replace(run, training=run.resolved_training())
            if force:
                forget_stage(run, name)
            with bar(name) as progress:
                result = STAGE[name].run(run, progress)
            title = f"{name} {how_it_went(result)}: {result.artifact.folder}"
            print_records(title, STAGE[name].table(run.config, result))


def _run_chain(config: Path, overrides: Sequence[str], force: bool) -> None:
    from infra.prefect_server import own_prefect_server
    from neox_core.config import load_config
    from tasks.preflight import check_run

    loaded = load_config(config, overrides)
    check_run(loaded)  # the flow does so too, but its server takes seconds to start
    _quiet_prefect(loaded.workdir)
    with own_prefect_server():
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.llemma_pretrain import llemma_pretrain

        # Heartbeats tell a server that a run on another machine lives; here they cost a second per flow.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            report = llemma_pretrain(str(config), list(overrides), force)
    assert report is not None  # as all stages are run
    print_rows(f"llemma-pretrain {config}", report.rows)


def _quiet_prefect(workdir: Path) -> None:
    """Before Prefect is imported: its embedded server keeps its data in the run's folder, and only errors are shown."""
    home = workdir / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(home))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_ROOT_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TQDM_DYNAMIC_NCOLS", "1")
