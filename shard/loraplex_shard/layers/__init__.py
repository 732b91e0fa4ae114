"""What a decoder is made of: linear layers, embedding, norms. A layer knows how it was cut for its rank, how it is
quantized and that adapters add to it; it does not know the device."""
