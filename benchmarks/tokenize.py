"""Tokenization speed: our encoder against SentencePiece's, and our stage against GPT-NeoX's way of doing it.

    python benchmarks/tokenize.py ../shared/data/mini-proof-pile ../shared/data/tokenizers/mistral-v1.model

See `tokenizing/compare.py`.
"""

from __future__ import annotations

import importlib.util
import os
import sys

if __name__ == "__main__":
    # A script's folder comes first on the path, where this file would stand for the standard library's module.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from benchmarks.tokenizing.compare import main

    main()
elif __name__ == "tokenize":  # imported by a script next to this file, for the standard library's module: be that
    spec = importlib.util.spec_from_file_location("tokenize", os.path.join(os.path.dirname(os.__file__), "tokenize.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tokenize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tokenize"])
