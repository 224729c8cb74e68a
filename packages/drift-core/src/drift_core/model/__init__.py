"""Models from Hugging Face directories: their description, their weights, and the decoder that runs them."""
