"""Everything about text: tokenizing, chat templates, detokenizing as tokens arrive, stop strings."""
