"""Commands beside training and prediction: `python -m tools.NAME --help` describes each."""
