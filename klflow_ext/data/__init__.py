"""Text in, tokens out.

files.py, pieces.py      documents of files, in flat memory           tokens.py    the token folder, by memory maps
text.py, holes.py        texts that memory holds                      order.py     in which order training sees a stream
tokenizer.py             byte-level BPE                               sources.py   streams, mixtures and their names
"""

from klflow_ext.data.files import TextFile, find_files
from klflow_ext.data.holes import LONGEST_HOLE, before_gap, encode_pieces, parse_holes, read_holes, with_spaces
from klflow_ext.data.pieces import END, PIECE, Part
from klflow_ext.data.sources import (
    Mixture,
    Shuffle,
    Stream,
    batch,
    from_reference,
    is_token_folder,
    one_file,
    open_streams,
    order_of,
    parse_sources,
    reference,
    same_tokenizer,
    token_counts,
)
from klflow_ext.data.text import documents, read_text, removed_lines, standard_library
from klflow_ext.data.tokenizer import encode, encode_parts, end_of, load_tokenizer, train_tokenizer, vocab_size_of
from klflow_ext.data.tokens import TokenFolder, Tokens

__all__ = [
    "END", "LONGEST_HOLE", "PIECE", "Mixture", "Part", "Shuffle", "Stream", "TextFile", "TokenFolder", "Tokens", "batch",
    "before_gap", "documents", "encode", "encode_parts", "encode_pieces", "end_of", "find_files", "from_reference", "is_token_folder", "load_tokenizer",
    "one_file", "open_streams", "order_of", "parse_holes", "parse_sources", "read_holes", "read_text", "reference", "removed_lines", "standard_library",
    "same_tokenizer", "token_counts", "train_tokenizer", "vocab_size_of", "with_spaces",
]  # fmt: skip
