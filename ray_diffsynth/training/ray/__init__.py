"""Stage 2 on Ray Train: the job, its workers, how many there are. Nothing else in training knows Ray."""
