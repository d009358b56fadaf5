"""What an experiment takes on a pod that is not there: memory, time, what bounds it, and its cost."""
