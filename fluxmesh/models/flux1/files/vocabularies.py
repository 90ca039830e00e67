"""The files that a vocabulary comes in: names alone, for whoever looks for them. Imports nothing.

`tokenizers.py` reads them. Either choice holds the whole; the first that is there is taken.
"""

TOKENIZER_JSON = "tokenizer.json"
CLIP_FILES = (("vocab.json", "merges.txt"), (TOKENIZER_JSON,))
T5_FILES = (("spiece.model",), (TOKENIZER_JSON,))
