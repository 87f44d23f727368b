"""Our token files in other programs' readers, and theirs in ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neox_core.data.indexed import IndexedDataset, IndexedWriter

megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")

DOCUMENTS = [[1, 2, 3], [65_535], [7] * 40, [0, 5]]


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_megatron_core_reads_ours(tmp_path: Path, dtype: str) -> None:
    with IndexedWriter(tmp_path / "ours", np.dtype(dtype)) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    read = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == len(DOCUMENTS)
    assert [read[i].tolist() for i in range(len(read))] == DOCUMENTS
    assert read.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert read.sequence_lengths.tolist() == [3, 1, 40, 2]
    assert read.get(2, offset=38, length=2).tolist() == [7, 7]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ours_reads_megatron_cores(tmp_path: Path, dtype: type[np.generic]) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    import torch

    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    read = IndexedDataset(tmp_path / "theirs")
    assert [read[i].tolist() for i in range(len(read))] == DOCUMENTS
    assert read.dtype == np.dtype(dtype)
    assert read.document_index.tolist() == [0, 1, 2, 3, 4]
