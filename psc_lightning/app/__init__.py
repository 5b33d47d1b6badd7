"""What `train.py` and `psc-train` run: data, models, training, resume and sweeps around the callbacks.

Nothing here is needed to use the callbacks in one's own program; `run.run` shows how they are used.
"""
