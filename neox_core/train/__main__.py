"""One rank's training without flows: `python -m neox_core.train CONFIG --data FOLDER --weights FOLDER --output FOLDER`.

With `--dry-run` instead of the folders it tries a step on zeros: does the run work, and fit, here?

Start it with torchrun for several ranks. It has the identity of the flow's training of the same config and artifacts,
so that it resumes the flow's checkpoints, and the other way round.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from neox_core.artifact import Artifact, read_artifact
from neox_core.config import EMBEDDED, RunConfig, batch_geometry, load_config
from neox_core.errors import GO_ON_EXIT_CODE, ConfigError, LlemmaError, StoppedError
from neox_core.train.identity import training_fingerprint, weights_identity

_SINGLE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def main() -> None:
    """Train; the last line that rank 0 prints is the summary as JSON.

    Errors that users can mend are one line on standard error. The exit code is 75 if the same command goes on from
    what is saved: training was told to stop, or hung.
    """
    arguments = _parser().parse_args()
    try:
        summary = _train(arguments)
    except StoppedError as stopped:
        _end(f"{stopped}\n", GO_ON_EXIT_CODE)
    except LlemmaError as error:
        _end(f"error: {error}\n", 1)
    except Exception:
        _end(traceback.format_exc(), 1)
    if os.environ["RANK"] == "0":
        sys.stdout.write(json.dumps(summary) + "\n")


def _end(words: str, code: int) -> NoReturn:
    """End this process now: a thread that waits for a peer or for the store must not keep it."""
    logging.shutdown()
    sys.stderr.write(words)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m neox_core.train", description=__doc__)
    parser.add_argument("config", type=Path, help="the run's YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file; repeatable"
    )
    parser.add_argument("--data", type=Path, help="folder of prepare-data's artifact")
    parser.add_argument("--weights", type=Path, help="folder of convert's artifact")
    parser.add_argument("--output", type=Path, help="folder for metrics and local checkpoint files")
    parser.add_argument("--dry-run", action="store_true", help="try a step on zeros, without data and weights, and end")
    return parser


def _train(arguments: argparse.Namespace) -> dict[str, object]:
    config = load_config(arguments.config, arguments.set)
    batch_geometry(config)
    if "RANK" not in os.environ:  # neither torchrun nor a scheduler started us
        os.environ.update(_SINGLE_RANK)
    if config.launch.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    if arguments.dry_run:
        from neox_core.train.run import rehearse

        return rehearse(config)
    if missing := [f"--{name}" for name in ("data", "weights", "output") if getattr(arguments, name) is None]:
        raise ConfigError(f"{', '.join(missing)} missing: give the artifacts' folders and one for what is written")
    _check_endpoint(config)
    data = _read(arguments.data, "prepare-data")
    weights = _read(arguments.weights, "convert")
    from neox_core.train.job import TrainJob
    from neox_core.train.resuming.lineage import ancestors
    from neox_core.train.run import train

    content = weights_identity(weights)
    identity = training_fingerprint(config, data.fingerprint, content)
    lineage = ancestors(config, data.fingerprint, content, weights.fingerprint)
    return train(config, TrainJob(data.folder, weights.folder, arguments.output, identity, lineage))


def _check_endpoint(config: RunConfig) -> None:
    if config.storage.endpoint_url == EMBEDDED:
        raise ConfigError(
            f"storage.endpoint_url is {EMBEDDED!r}, a server that only the flows start: give a server's URL here, or "
            "use `llemma run`"
        )


def _read(folder: Path, stage: str) -> Artifact:
    artifact = read_artifact(folder)
    if artifact.name != stage:
        raise ConfigError(f"{folder} holds the artifact of stage {artifact.name}, not of {stage}: give its folder")
    return artifact


if __name__ == "__main__":
    main()
