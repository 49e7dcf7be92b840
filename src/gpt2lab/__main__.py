"""``python -m gpt2lab``."""

from gpt2lab.cli import main

if __name__ == "__main__":
    main()
