"""Our stage, as `benchmarks/tokenizing/neox_way.py` is called.

    python benchmarks/tokenizing/our_way.py MODEL WORKERS PREFIX FILE.jsonl.zst ...

Parts by worker processes, a sample of each verified against SentencePiece, checksums, and the merge; as prepare-data
does it, but for the configuration, the digests of inputs and results, and the artifact. This process is what
prepare-data's fork server is (tasks/tokenization/fork_server.py), which there is started alongside the flow's;
as there, the garbage collector is off.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path


def main() -> None:
    """Write PREFIX.bin and PREFIX.idx of the files' texts."""
    gc.disable()
    from neox_core.data.tokenization.merge import merge
    from neox_core.data.tokenization.part_files import PartPaths
    from neox_core.data.tokenization.part_settings import PartSettings, TokenizerSettings
    from neox_core.data.tokenization.readers import InputFile
    from tasks.tokenization.fork_server import made_in_forks
    from tasks.tokenization.pool import Order

    model, workers, prefix, *paths = sys.argv[1:]
    folder = Path(prefix).parent
    settings = PartSettings(TokenizerSettings(Path(model)), None)
    files = tuple(
        InputFile("all", "train", f"{n}-{Path(p).name}", p, Path(p).stat().st_size) for n, p in enumerate(paths)
    )
    for _ in made_in_forks(Order(files, settings, folder, int(workers))):
        pass
    merge([PartPaths.of(file, folder).prefix for file in files], Path(prefix), int(workers))


if __name__ == "__main__":
    main()
