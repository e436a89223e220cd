"""LoRA on a model: which weights, how they are seen, what is put beside them."""
