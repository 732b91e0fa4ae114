"""The `loraplex` command. `main.py` lists its subcommands; those that run services import them when called."""
