"""The training data: synthesized sounds, captions of them, tokenizers trained on the captions."""
