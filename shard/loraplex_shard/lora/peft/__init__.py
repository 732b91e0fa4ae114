"""Interprets the files of a PEFT adapter for the base model that is served, and refuses by name what is not served."""
