"""Beyond one process: what processes tell each other, and how a model is spread over them."""
