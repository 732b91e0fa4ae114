"""The router's vocabulary: requests, references, conversations, sequences, plans. Only data and rules about data:
imports nothing from the router."""
