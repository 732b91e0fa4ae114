"""A load generator: `python -m bench --help`. Measures a server, or two side by side."""
