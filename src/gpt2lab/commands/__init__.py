"""What can be typed: each module holds the commands of one kind, their flags and what they call.

Whatever needs torch is imported inside a command, so that ``gpt2lab --help`` does not wait for it.
"""
