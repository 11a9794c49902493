"""Run folders: where they lie, how they are written, what is logged."""
