"""The router benchmark: small tasks whose ideal routing is known, so that a few CPU-seconds compare two routers."""
