"""What happens when in a Trainer's run: one conductor owns the order of a step."""
