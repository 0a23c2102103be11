"""All that can be said of a run before torch is loaded. Standard library only."""
