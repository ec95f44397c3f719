"""Infrastructure that is independent of pruning: processes, memory, offloading, resuming, progress."""
