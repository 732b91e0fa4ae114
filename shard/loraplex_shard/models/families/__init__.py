"""How the configurations of transformers' architectures become DecoderSpecs."""
