"""The realistic tier of the router benchmark: a byte-level language model on a mix of clearly distinct domains."""
