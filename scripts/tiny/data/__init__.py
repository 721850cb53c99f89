"""The training data: synthesised sounds, captions of them, tokenizers trained on the captions."""
