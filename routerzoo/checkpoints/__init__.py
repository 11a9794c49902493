"""Reading and writing checkpoints: one file, or a folder of shards."""
