"""LoRAX's face: the routes and shapes that `lorax-client` and `text-generation` rely on."""
