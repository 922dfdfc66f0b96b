"""What any room may use and what knows nothing of pruning: files, tables, plots, unwrapping."""
