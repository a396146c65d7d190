"""The training run: `run.train` wires it together; the other files contain its parts."""
