"""GPT-2 and its variants: parts that take built modules and plain numbers, wired in ``gpt2.py``."""
