"""The Mixture-of-Experts layer: experts, dispatch and the grouped products."""
