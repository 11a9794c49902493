"""Pure functions of routing, on plain tensors."""
