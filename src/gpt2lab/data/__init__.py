"""Text to batches: what text (sources), tokenised once (shards), and which of it at which step (batches)."""
