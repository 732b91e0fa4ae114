"""Models that our own decoder does not know. They run with transformers' modeling code, on our attention, linear layers
and cache. Importing this package loads that modeling code, which takes a while, so it is imported only on demand."""
