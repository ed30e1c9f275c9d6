"""Text → token blocks in Parquet, split into train and held-out."""

from pipeline.corpus.build import draw_split, write_corpus
from pipeline.corpus.reader import Blocks, Corpus, CorpusManifest, Split, open_corpus
from pipeline.corpus.tokens import hash_tokenizer

__all__ = [
    "Blocks",
    "Corpus",
    "CorpusManifest",
    "Split",
    "draw_split",
    "hash_tokenizer",
    "open_corpus",
    "write_corpus",
]
