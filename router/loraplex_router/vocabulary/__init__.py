"""The router's vocabulary: requests, references, conversations, sequences, plans. Data and rules about data alone:
imports nothing of the router."""
