"""The tasks of the exact tier, one a file; every module here is imported."""
