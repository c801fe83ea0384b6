"""Text to samples: formats, tokenizers, packing, order and delivery. Nothing here imports MindSpore."""
