"""`llemma status` and `llemma logs`: how a run is, from any terminal."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import ConfigArgument, SetOption
from flows.cli.printing import bar, print_records, print_rows
from neox_core.config import RunConfig, load_config
from neox_core.errors import ConfigError

_PlaceArgument = Annotated[Path, typer.Argument(help="A run's YAML file; or a workdir, for all that was begun there.")]
_LinesOption = Annotated[int, typer.Option("--lines", "-n", min=1, help="Of each rank's log, the last ones.")]
_StageArgument = Annotated[str, typer.Argument(metavar="[STAGE]", help="train or evaluate.")]


def status(place: _PlaceArgument, overrides: SetOption = None) -> None:
    """Show each stage of a run: whether it is finished, how far it is, its last incident, and where things lie."""
    if place.is_dir():
        _show_workdir(place)
    else:
        _show_run(load_config(place, overrides or ()))


def logs(config: ConfigArgument, stage: _StageArgument = "train", lines: _LinesOption = 20) -> None:
    """Show the end of the logs of a stage's last job, of each rank."""
    from tasks.identity.specs import EVALUATE, TRAIN
    from tasks.overview import log_files, stage_jobs

    if stage not in (TRAIN, EVALUATE):
        raise ConfigError(f"stage {stage!r} has no jobs with logs: give {TRAIN} or {EVALUATE}")
    loaded = load_config(config)
    jobs = stage_jobs(loaded, stage)
    if not jobs:
        raise ConfigError(f"no job of {stage} was submitted in {loaded.workdir} as {config} stands")
    for path in log_files(jobs):
        with path.open(encoding="utf-8", errors="replace") as file:
            last = deque(file, maxlen=lines)
        typer.echo(f"==> {path} <==")
        typer.echo("".join(last).rstrip("\n") + "\n")


def doctor(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Look at the surroundings: packages, disk, SLURM, GPUs, object store, W&B; and say how to mend what fails."""
    from tasks.doctor import examine

    findings = []
    with bar("doctor") as progress:
        for finding in examine(load_config(config, overrides or ())):
            findings.append(finding)
            progress(0.0, finding.what)
    print_records("doctor", [{"": f.what, "state": f.state, "found": f.text} for f in findings])
    if any(finding.state == "fault" for finding in findings):
        raise typer.Exit(1)


def _show_run(config: RunConfig) -> None:
    from tasks.identity.training import find_training
    from tasks.overview import last_incident, stage_views
    from tasks.report.places import REPORT_FILE

    records = [
        {"stage": view.stage, "state": view.state, "how far": view.text, "where": view.place}
        for view in stage_views(config)
    ]
    print_records(f"{config.name} in {config.workdir}", records)
    training, report = find_training(config), config.workdir / REPORT_FILE
    rows = [("report", str(report))] if report.is_file() else []
    if training:
        rows += [("checkpoints", f"{config.storage.url.rstrip('/')}/{training.prefix}")]
        rows += [("last incident", text) for text in [last_incident(training.scratch)] if text]
    print_rows("see also", [*rows, ("Prefect", _pages())])


def _show_workdir(workdir: Path) -> None:
    from tasks.identity.specs import TRAIN
    from tasks.identity.training import find_training
    from tasks.overview import begun_runs, last_incident, stage_views

    records = []
    for config in begun_runs(workdir):
        view = next(view for view in stage_views(config) if view.stage == TRAIN)
        training = find_training(config)
        records.append(
            {
                "run": config.name,
                "training": view.state,
                "how far": view.text,
                "last incident": last_incident(training.scratch) if training else "",
                "where": view.place,
            }
        )
    if not records:
        raise ConfigError(f"no training was begun in {workdir}: give a workdir, or a run's YAML file")
    print_records(f"trainings in {workdir}: {len(records)}", records)
    print_rows("see also", [("Prefect", _pages())])


def _pages() -> str:
    from infra.prefect.services import default_folder, running_page

    return running_page(default_folder()) or "no server was started here (`llemma up`)"
