"""The models around the MoE layer: a language decoder, and timm's vision transformers."""
