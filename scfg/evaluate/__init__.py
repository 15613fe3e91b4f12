"""How good the embedded model is, measured where the truth is known: `python -m scfg.evaluate`."""
