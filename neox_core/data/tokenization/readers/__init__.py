"""Raw text: which files there are, and every record of a file as a document or a named rejection."""

from neox_core.data.tokenization.readers.documents import documents, read_records
from neox_core.data.tokenization.readers.formats import SourceFormat, register_source_format, source_formats
from neox_core.data.tokenization.readers.inputs import SPLITS, InputFile, open_input, source_files, splits_of
from neox_core.data.tokenization.readers.record import DamagedFileError, Document, Rejection, WrongColumnError

__all__ = [
    "SPLITS",
    "DamagedFileError",
    "Document",
    "InputFile",
    "Rejection",
    "SourceFormat",
    "WrongColumnError",
    "documents",
    "open_input",
    "read_records",
    "register_source_format",
    "source_files",
    "source_formats",
    "splits_of",
]
