"""The doctor: what is in a prepared text, and what is wrong with it."""
