"""What a model knows: losses on text, each token scored once."""
