"""Pages that one would send to a colleague: a run's own, and a Pareto page of many. They need run folders alone, no model."""
