"""Two results of the same work: are they equal, and where not, why."""
