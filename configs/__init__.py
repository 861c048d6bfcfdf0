"""One file per run. `common.py` is the only home of shared defaults."""
