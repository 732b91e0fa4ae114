"""Turns the configurations of transformers' architectures into DecoderSpecs."""
