"""Raw text: which files there are, and every record of a file as a document or a named rejection."""

from neox_core.data.tokenization.readers.documents import documents, read_records
from neox_core.data.tokenization.readers.inputs import SPLITS, SUFFIXES, InputFile, open_input, source_files
from neox_core.data.tokenization.readers.record import DamagedFileError, Document, Rejection, WrongColumnError

__all__ = [
    "SPLITS",
    "SUFFIXES",
    "DamagedFileError",
    "Document",
    "InputFile",
    "Rejection",
    "WrongColumnError",
    "documents",
    "open_input",
    "read_records",
    "source_files",
]
