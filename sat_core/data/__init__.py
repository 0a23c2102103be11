"""From data files to a memory-mapped corpus, and from the corpus to batches."""
