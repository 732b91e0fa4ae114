"""The copies of the model behind this router: how they are found, which of them a request goes to, what becomes of it
when one is lost, and what operators ask of them."""
