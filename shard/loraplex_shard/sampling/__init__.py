"""How tokens are chosen: the sampler, grammars and the masks that they make, the schemas that they come from."""
