"""Several runs that differ in one thing each, measured side by side."""
