"""The jobs behind the front door: each module has `run(config, workdir)`."""
