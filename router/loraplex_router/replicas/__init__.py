"""The copies of the model behind this router: finding them, placing requests, moving requests when a replica is lost,
and operators' calls."""
