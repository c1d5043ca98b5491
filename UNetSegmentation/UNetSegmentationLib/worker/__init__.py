"""The child process that computes, and its client: a crash, a full memory or a cancel never reaches the panel."""
