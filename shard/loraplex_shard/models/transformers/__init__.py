"""Models that run with transformers' own modeling code, on our attention, linear layers and cache: those that our own
decoder does not know. Importing this loads transformers' modeling code, which takes a while: only on demand."""
