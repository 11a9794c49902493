"""The command line: `LightningCLI` and the commands beside it."""
