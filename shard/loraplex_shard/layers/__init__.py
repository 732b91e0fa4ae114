"""The layers of a decoder: linear layers, embedding, norms. A layer knows how it is cut for its rank, how it is
quantized and that adapters add to it. It does not know the device."""
