"""More than one process: collectives, FSDP2 and expert parallelism."""
