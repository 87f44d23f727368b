"""Our stage, as `benchmarks/tokenizing/neox_way.py` is called.

    python benchmarks/tokenizing/our_way.py MODEL WORKERS PREFIX FILE.jsonl.zst ...

Parts by worker processes, a sample of each verified against SentencePiece, checksums, and the merge; as prepare-data
does it, but for the configuration, the digests of inputs and results, and the artifact.
"""

from __future__ import annotations

import sys
from pathlib import Path

from neox_core.data.merge import merge
from neox_core.data.part_files import PartPaths
from neox_core.data.part_settings import PartSettings, TokenizerSettings
from neox_core.data.readers import InputFile
from tasks.tokenize_pool import made_in_processes


def main() -> None:
    """Write PREFIX.bin and PREFIX.idx of the files' texts."""
    model, workers, prefix, *paths = sys.argv[1:]
    folder = Path(prefix).parent
    settings = PartSettings(TokenizerSettings(Path(model)), None)
    files = [InputFile("all", "train", f"{n}-{Path(p).name}", p, Path(p).stat().st_size) for n, p in enumerate(paths)]
    for _ in made_in_processes(files, settings, folder, int(workers)):
        pass
    merge([PartPaths.of(file, folder).prefix for file in files], Path(prefix), int(workers))


if __name__ == "__main__":
    main()
