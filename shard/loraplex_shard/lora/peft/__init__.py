"""What the files of a PEFT adapter mean for the base model that is served, and what is refused by name."""
