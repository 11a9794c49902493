"""Run folders: layout, atomic writes, checkpoints, logs and reports."""
